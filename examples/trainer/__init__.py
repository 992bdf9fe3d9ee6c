"""The modules of the example trainer; `examples/train.py` is its command line."""
