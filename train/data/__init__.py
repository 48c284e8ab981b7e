"""From files of text to the batches of a step.

    records    what is in a file: lines, rows, records, each with its place for a complaint
    examples   one of them as token ids, and which of those are learnt
    store      all of them on the disk, tokenised once
    packing    short ones side by side, in rows of one length
    feed       rows of one or several files, shuffled and mixed, as batches that have numbers

A batch depends on its number and the seed alone: to go on after any step nothing else is kept.
"""
