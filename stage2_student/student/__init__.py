"""The student: networks with LoRA, adapters on disk, sampling, export."""
