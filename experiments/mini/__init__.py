"""Training of MINI, the small SAM that ships, on photographs and generated scenes."""
