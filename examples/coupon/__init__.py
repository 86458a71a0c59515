"""Will a driver accept this coupon? See model.py."""
