from __future__ import annotations

import pytest
import torch

from moec.runtime.errors import ContextError, InputError
from moec.runtime.generate import check_context, choose_tokens
from moec.runtime.options import GenerateOptions


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def draws(logits: torch.Tensor, count: int, **options: float) -> torch.Tensor:
    """Relative frequency of each token over `count` rows of the same logits."""
    rows = logits.expand(count, -1)
    chosen = choose_tokens(rows, GenerateOptions(**options), generators(count))
    return torch.bincount(torch.tensor(chosen), minlength=logits.shape[0]) / count


LOGITS = torch.tensor([0.0, 2.0, 1.0, 3.0])


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    rows = torch.tensor([[0.0, 5.0, 1.0], [2.0, 1.0, 2.0]])
    assert choose_tokens(rows, GenerateOptions(), generators(2)) == [1, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_distribution(temperature: float) -> None:
    # 4000 draws: three standard deviations of a frequency are at most 3*sqrt(0.25/4000) = 0.024
    found = draws(LOGITS, 4000, temperature=temperature)
    assert torch.allclose(found, (LOGITS / temperature).softmax(0), atol=0.024)


def test_top_k_and_top_p_drop_the_rest() -> None:
    assert (draws(LOGITS, 500, temperature=1.0, top_k=2) > 0).tolist() == [False, True, False, True]
    # the two best hold 0.644 + 0.237: the third is needed only above 0.88
    assert (draws(LOGITS, 500, temperature=1.0, top_p=0.8) > 0).tolist() == [False, True, False, True]
    assert (draws(LOGITS, 500, temperature=1.0, top_p=0.9) > 0).tolist() == [False, True, True, True]
    assert (draws(LOGITS, 50, temperature=1.0, top_p=1e-6) > 0).tolist() == [False, False, False, True]


def test_a_seed_gives_the_same_draws_alone_and_in_a_batch() -> None:
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    options = GenerateOptions(temperature=0.8, top_k=20, top_p=0.9)
    together = choose_tokens(rows, options, generators(6, seed=11))
    alone = [choose_tokens(rows[i : i + 1], options, generators(1, seed=11 + i))[0] for i in range(6)]
    assert together == alone
    assert together != choose_tokens(rows, options, generators(6, seed=99))


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5)],
)
def test_options_outside_of_their_range(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        GenerateOptions(**{name: value})


def test_end_of_context() -> None:
    assert check_context([[1, 2, 3], [1]], 4, 6) == 6  # the fourth new token is never fed back
    with pytest.raises(ContextError, match="ask for at most 4 new tokens"):
        check_context([[1, 2, 3], [1]], 5, 6)
    assert check_context([[1] * 100], 100, 0) == 199
