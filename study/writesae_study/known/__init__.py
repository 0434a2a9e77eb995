"""Models of the zoo, whose writes are known to hold facts: what methods find in these writes without labels.

A *fact* is a key with its value. The truth table of a model names the write that holds it, W = k u^T. A method is
fitted to writes alone. It gives a code of each (`sides.HeadCode`); symbols only score.

`world` has the writes and the facts, `sides` the codes that methods give, `methods` the table of methods, `scores` what
they find; `states` how facts are read from states, `readers` the table of readers; `board` the rows of one model.

Alphabet: N writes, H heads that hold a fact together, F atoms, K key side, V value side, B facts or states, P pairs,
S symbols that values are made of (64 values, or 24 attributes).
"""
