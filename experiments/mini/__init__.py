"""The training of MINI, the small SAM that ships."""
