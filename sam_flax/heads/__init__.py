"""The prompt encoder and the mask decoder, which all segmenters share."""
