"""The balancing loss of a mixture of experts: what transformers itself would train on.

balance_weight    what the loss counts beside that of the tokens; 0 for none
balance_remark    what to tell of a mixture that has none
"""

from __future__ import annotations

import sys
from typing import Any

BALANCE_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")
"""What the classes of models call the loss's weight, in themselves and in their configuration."""


def balance_weight(hf_model: Any) -> float:
    """The weight of a model's own balancing loss, as transformers adds it; 0 if it has none.

    A weight in the configuration alone says nothing: some classes keep one and compute no loss.
    """
    if not _has_loss(hf_model):
        return 0.0
    return float(next((getattr(hf_model, n) for n in BALANCE_WEIGHTS if hasattr(hf_model, n)), 0))


def switch_off(config: Any) -> None:
    """Set the weight of the balancing loss in a configuration to 0, whatever it is called."""
    for name in BALANCE_WEIGHTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)


def balance_remark(hf_model: Any) -> str | None:
    """What to tell of a mixture of experts for which transformers has no balancing loss."""
    has_experts = any("expert" in name.lower() for name, _ in hf_model.named_parameters())
    if not has_experts or _has_loss(hf_model):
        return None
    return (
        f"model: {hf_model.config.model_type} is a mixture of experts without a balancing loss "
        "in transformers: nothing here keeps its experts evenly used"
    )


def _has_loss(hf_model: Any) -> bool:
    return hasattr(sys.modules[type(hf_model).__module__], "load_balancing_loss_func")
