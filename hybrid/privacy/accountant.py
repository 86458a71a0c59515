"""What a mechanism costs: RDP curves, PRV, the exact Gaussian."""
