"""How each rival is called."""
