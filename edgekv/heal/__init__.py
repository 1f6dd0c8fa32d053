"""Distillation of a GQA teacher into an MLA student, in PyTorch. No other room imports torch.

    job.py             from a model file and texts to a file of healed weights: start here
    recipe.py          recipe, events and record of a training; standard library only
    weights.py         the file of healed weights, and the original with them put in
    basis.py           the cache basis of a healed student
    training.py        the two phases, evaluations, checkpoints
    teacher_student.py teacher and student on one device: weights in, losses out
    torch_blocks.py    one block of each as a function, so that one compiled block serves all
    cache_rounding.py  straight-through simulation of llama.cpp's quantized cache rows
    kl.py              KL over the vocabulary in chunks, with its gradient computed on the way
    kl_triton.py       the CUDA kernel of that KL
    optimizer.py       Muon, AdamW and the learning-rate schedule
    judge.py           perplexity, KL and argmax agreement against the float32 teacher
    state.py           training state that survives kill -9
    teacher_text.py    the teacher writes its own training text

job, recipe, weights and basis can be imported without PyTorch, which alone takes seconds to import; job imports the
others when it runs.
"""
