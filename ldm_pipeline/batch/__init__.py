"""Many pictures on many processes.

    accelerate launch -m ldm_pipeline.batch --prompts FILE --out DIR

    orders.py      what is asked for: a file of prompts -> orders, each with the name of its picture
    __main__.py    the program: shares the orders out over the processes and draws them

A picture's name is made of its settings and its seed, so what is there already is not drawn again,
whatever else the file of prompts has gained or lost; and each process draws its orders one by one,
so that the pictures are the same, byte for byte, on any number of processes.
"""
