import torch

from agglomerator.training.metrics import in_top5


def test_a_class_without_a_mean_is_never_among_the_first_five():
    """Its logit is -inf; where fewer than five classes have a mean, others fill up the five."""
    logits = torch.full((3, 8), -torch.inf)
    logits[:, [2, 5]] = torch.tensor([0.1, 0.3])
    assert in_top5(logits, torch.tensor([2, 5, 0])).tolist() == [1, 1, 0]
    logits = torch.arange(8.0).expand(8, 8)
    assert in_top5(logits, torch.arange(8)).tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert in_top5(logits[:2, :3], torch.tensor([0, 2])).tolist() == [1, 1]
