"""The vision side of a model folder, read without torch: token ids, sizes and the sizing rule.

`spec` is what every process may know · `fields` finds the files and fields · the other modules turn
one family's settings into its rule and refuse what the tower or the prompt could not do exactly.
"""
