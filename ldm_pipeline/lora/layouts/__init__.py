"""How tools spell LoRAs in files: one module for each layout, and `files` as the door to all."""
