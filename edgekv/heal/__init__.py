"""Distillation of a GQA teacher into an MLA student, in PyTorch: the only room that imports torch.

    model.py      teacher and student, written as one function a block so that one compiled block serves all
    fakequant.py  straight-through simulation of llama.cpp's quantized cache rows
    loss.py       KL over the vocabulary, in chunks, with its gradient computed on the way
    kl_triton.py  the CUDA kernel of that KL
    optim.py      AdamW, Muon and the learning-rate schedule
    checkpoint.py training state that survives kill -9
    evaluate.py   perplexity, KL and argmax agreement against the float32 teacher
    sample.py     the teacher writes its own training text
    loop.py       the two phases

Import these modules lazily: `import torch` alone takes seconds.
"""
