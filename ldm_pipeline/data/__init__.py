"""Data: the procedural picture world whose truth is known, and folders of captioned images."""
