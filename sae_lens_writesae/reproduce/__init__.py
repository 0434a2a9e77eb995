"""The paper's whole table for one model: train, evaluate, report; resumable at every step, over many processes.

`config` says what a run covers, `tasks` makes its steps, `workspace` does one, `run` does those that are left,
`estimate` says beforehand what it costs, `command` is what people type.
"""
