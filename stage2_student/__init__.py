"""Stage two: trains and samples the LoRA student from records alone."""
