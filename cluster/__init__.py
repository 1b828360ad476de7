"""Where a run runs: a cluster of several nodes on one machine, and faults put into any cluster.

    local.py       LocalCluster: raylets on this machine, whose nodes join, die and are reclaimed
    faults.py      what goes wrong, and when: pure, seeded schedules
    processes.py   what is done to processes, on the machine where they run
    targets.py     how a cluster's workers and nodes are found and struck, local or real
    damage.py      what is done to files: checkpoints, and the space that is left for them
    injector.py    watches a run, and strikes once a step is reached
    chaos.py       all of that by one name; the command line
    notices.py     passes a cloud's notice of reclaim on to Ray; a command for each node

`tst_ray` and `pipelines` import nothing of it.
"""
