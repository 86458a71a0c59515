"""Will this piece of coursework get 80 or more? See model.py."""
