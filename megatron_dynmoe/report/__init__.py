"""What a run logged, as a picture and a table; needs neither torch nor megatron, matplotlib only for the picture."""
