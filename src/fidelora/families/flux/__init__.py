"""FLUX.1 and Flex.1: one transformer on a flow, with CLIP and T5 as text encoders."""
