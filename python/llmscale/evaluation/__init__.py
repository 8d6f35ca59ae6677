"""What a model is worth on items: perplexity, exact match, and both beside a reference model.

`items` makes token ids, `scorer` computes log probabilities of given tokens, `comparison` is the statistics of pairs,
`evaluation` puts them together.
"""
