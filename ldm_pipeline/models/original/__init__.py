"""Single files in Stable Diffusion's original layout (CompVis, Stability AI), read and written.

Such a file holds the UNet, the autoencoder and the text encoders of a model under the names of the
code that they were trained with, and no configs. Here is what leads from there to the layout of
Diffusers and back:

    tensors.py    tensors as stretches of bytes in files; reading and writing them
    names.py      a module here is a module there
    unet.py, autoencoder.py, clip.py    the names of each kind of network, from its config
    families.py   SD 1.x, SD 2.x, SDXL: which parts a file has, under which prefixes
    configs.py    the configs of a file's networks, from the shapes of its tensors
    note.py       what our own files say in their header about the folder they were made of
    checkpoint.py a file as components: detect, name, check
    build.py      its components, loaded
    convert.py    folder to file and file to folder
    tokenizers.py where CLIP's vocabulary comes from

The names were worked out from the architecture: block i of the original counts resnets and
resamplers in the order in which they run, so that any depth and width has its names.
"""
