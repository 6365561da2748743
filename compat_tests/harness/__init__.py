"""What the cells of the matrix are made of; nothing here is imported by the distributions."""
