"""Generated scenes on which MINI is trained, calibrated and evaluated."""
