"""The likelihood of real codes beside a reward, with the prior's dropout or without."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ral_gym.agents import algorithm_defaults, find_algorithm, make_sb3_env, policy_for
from ral_gym.agents.real_codes import real_codes_loss, with_dropout
from ral_gym.agents.regularizers import MLEShare
from ral_gym.config import RALConfig
from ral_gym.errors import ConfigError
from ral_gym.priors.base import maximum_likelihood_loss
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.transformer import Transformer
from ral_gym.runs.sharing import Processes

K, N = 8, 5
CODES = np.random.default_rng(0).integers(K, size=(40, 16)).astype(np.int16)
SIZES: dict[str, Any] = {"hidden_units": 12, "residual_units": 12, "layers": 2, "conv_filter_size": 3}


def policy_of(prior: Any, processes: Processes | None = None) -> Any:
    return SimpleNamespace(prior=prior.eval(), processes=processes or Processes(), device=torch.device("cpu"))


def pixelcnn(dropout: float = 0.5) -> PixelCNN:
    torch.manual_seed(1)
    return PixelCNN(K, 4, 4, dropout=dropout, **SIZES)


def transformer(dropout: float = 0.5) -> Transformer:
    torch.manual_seed(1)
    arguments: dict[str, Any] = {"hidden_units": 8, "layers": 2, "attention_heads": 2, "multiple_of": 8}
    prior = Transformer(K, 4, 4, classes=3, dropout=dropout, class_dropout=0.9, **arguments)
    torch.nn.init.normal_(prior.output.weight)  # it starts at 0
    return prior


def real_loss(policy: Any, codes: np.ndarray, dropout: bool) -> torch.Tensor:
    torch.manual_seed(0)
    np.random.seed(0)
    return real_codes_loss(policy, codes, N, dropout)


def labelled(codes: np.ndarray) -> np.ndarray:
    return np.concatenate([codes, K + 2 + codes[:, :1] % 3], 1)


@pytest.mark.parametrize("make, codes", [(pixelcnn, CODES), (transformer, labelled(CODES))])
def test_dropout_is_on_in_this_pass_alone(make: Any, codes: np.ndarray) -> None:
    policy = policy_of(make())
    np.random.seed(0)
    rows = torch.from_numpy(codes[np.random.randint(len(codes), size=N)]).long()
    plain, dropped = real_loss(policy, codes, False), real_loss(policy, codes, True)
    assert torch.equal(plain, maximum_likelihood_loss(policy.prior, rows))
    assert (dropped - plain).abs() > 1e-3
    assert not any(part.training for part in policy.prior.modules())
    without = policy_of(make(0.0))
    assert torch.equal(real_loss(without, codes, True), real_loss(without, codes, False))  # labels are kept, too


def test_a_prior_is_as_it_was_even_after_an_error() -> None:
    prior = transformer().eval()
    with pytest.raises(RuntimeError, match="stop"), with_dropout(prior):
        assert prior.training and prior.class_dropout == 0
        raise RuntimeError("stop")
    assert not prior.training and prior.class_dropout == 0.9


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("count", [2, 3, 7])  # 7: two processes have no image
def test_the_shares_of_processes_sum_to_the_whole(count: int, dropout: bool) -> None:
    prior = pixelcnn().double()
    whole = real_loss(policy_of(prior), CODES, dropout)
    shares = [real_loss(policy_of(prior, Processes(rank, count)), CODES, dropout) for rank in range(count)]
    torch.testing.assert_close(torch.stack(shares).sum(), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("algo", ["reinforce", "grpo", "ppo"])
def test_training_with_it_differs_and_the_ratio_stays_one(algo: str) -> None:
    found = []
    for dropout in (False, True):
        torch.manual_seed(0)
        env = make_sb3_env("ral_gym/Toy-v0", 8, seed=0)
        own = {} if algo == "ppo" else {"mle_coef": 0.5, "mle_dropout": dropout}
        arguments = algorithm_defaults(algo, env, prior=pixelcnn()) | {"seed": 0, "device": "cpu"} | own
        model = find_algorithm(algo).cls(policy_for(algo), env, **arguments)
        model.learn(2 * 16 * 8, callback=MLEShare(0.5, dropout=dropout) if algo == "ppo" else None)
        found.append(torch.cat([weight.flatten() for weight in model.policy.prior.parameters()]).detach())
        assert not model.policy.prior.training
        if algo == "reinforce":
            assert model.logger.name_to_value["train/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert not torch.equal(*found)


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_dropout_of_no_term_is_refused(algo: str) -> None:
    config = RALConfig(algo=algo, mle_dropout=True)
    with pytest.raises(ConfigError, match=r"ral\.mle_dropout is on, but ral\.mle_coef is 0"):
        find_algorithm(algo).check(config)
