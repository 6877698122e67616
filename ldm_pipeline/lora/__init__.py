"""LoRA: which modules are adapted, putting adapters in and out, their files, using several."""
