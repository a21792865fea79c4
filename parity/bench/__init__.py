"""How fast: layers and single operations, side by side, against what the machine could do."""
