"""The whole way of a model on one machine: real text, tokenizer, pretraining, resuming, export, generation.

``steps.py`` says what is run, ``runner.py`` how a step is run and watched, ``summary.py`` what came of it.
"""
