"""What `gradient.py` measures with: the toy, and what roll-outs cost."""
