"""YAML as settings are written in it: bounded, and without the surprises of YAML 1.1.

An alias (`*name`) stands for all that its anchor names, and aliases of aliases multiply: a few
lines can stand for billions of values. They are counted before any value is made.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from pipelines.errors import one_line

_MAX_VALUES = 100_000  # that a text with aliases may stand for


class _Bounded(yaml.SafeLoader):
    """Plain values only, and no more of them than can be looked at."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _num_values(node, {})
        return node


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, aliases written out.

    Args:
        known: those of each node counted so far, by its id; 0 while it is being counted.
    """
    number = known.get(id(node))
    if number == 0:
        raise yaml.composer.ComposerError(None, None, "an alias inside of itself", node.start_mark)
    if number is None:
        known[id(node)] = 0
        number = known[id(node)] = 1 + sum(_num_values(below, known) for below in _below(node))
        if number > max(_MAX_VALUES, len(known)):  # without aliases, as many as there are nodes
            raise yaml.composer.ComposerError(
                None, None, f"aliases stand for more than {_MAX_VALUES:,} values", node.start_mark
            )
    return number


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


class _Meant(_Bounded):
    """YAML as people mean it: 2e-3 is a number, a date is text, a key said twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, match) for tag, match in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        said: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in said:
                    what = f"{key.value} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
                said.add(key.value)
        return super().construct_mapping(node, deep)


_Meant.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def read_yaml(text: str | bytes, where: str, as_people_mean_it: bool = True) -> Any:
    """The value of a YAML text.

    Args:
        where: what the text is called in errors.
        as_people_mean_it: whether a person wrote it; else it was dumped by `yaml`.

    Raises:
        ValueError: it is no YAML, or stands for too much; says why, in one line, and where.
    """
    try:
        return yaml.load(text, Loader=_Meant if as_people_mean_it else _Bounded)
    except yaml.MarkedYAMLError as error:
        where += f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        wrong = error.problem
    except RecursionError:
        wrong = "it is nested too deeply"
    except Exception as error:  # PyYAML raises what Python does: a KeyError of `!!bool x`
        wrong = one_line(error)
    raise ValueError(f"{where}: not valid YAML: {wrong}")
