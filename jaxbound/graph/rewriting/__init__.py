"""What is written in several ways and means one thing: recognised here, once, while a function is traced."""
