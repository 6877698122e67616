"""LoRA: which modules are adapted, adapters in and out, files of every layout, using several."""
