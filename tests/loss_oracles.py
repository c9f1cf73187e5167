"""Every method of the table once more, one pair and one token at a time, from the papers' formulas.

Nothing of the library is in here. A response is a list of tokens, a token a dict of scalars: log p
(`p`), log p_ref (`q`), the KL at its state (`kl`), its contrast (`c`). Sums are loops.
"""

import math
from typing import Any

import torch
from torch import Tensor

Token = dict[str, Tensor]
Response = list[Token]


def logistic(u: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(u))


def sba(lam: float, scale: float = 4.0) -> Any:
    """docs/method.md §3's last row, with the constant of the form that is continuous in λ."""

    def loss(u: Tensor) -> Tensor:
        if lam == 0:
            return (torch.exp(u) + u) / scale
        power = torch.exp((1 + lam) * u) / (scale * (1 + lam))
        return power - torch.exp(-lam * u) / (scale * lam) + 1 / (scale * lam)

    return loss


def noisy(loss: Any, u: Tensor, smoothing: float) -> Tensor:
    return (1 - smoothing) * loss(u) + smoothing * loss(-u)


def rho(token: Token) -> Tensor:
    return token["p"] - token["q"]


def total(values: Any) -> Tensor:
    found = torch.zeros((), dtype=torch.float64)
    for value in values:
        found = found + value
    return found


def mean(values: Any) -> Tensor:
    values = list(values)
    return total(values) / len(values)


def per_token(kind: str, average: bool, generator: Any = None) -> Any:
    """TBPO's variants and ADPO; `weight` is the learned log w of each step."""

    def loss(w: Response, l: Response, weight: Any, *, beta, label_smoothing, **more: Any):  # noqa: E741
        ell = generator or more["ell"]
        terms = []
        for t in range(min(len(w), len(l))):
            score = rho(l[t]) - rho(w[t])
            if kind == "kl":
                score = score + l[t]["kl"] - w[t]["kl"]
            if kind == "baseline":
                score = score + weight[t]
            terms.append(noisy(ell, beta * score, label_smoothing))
        return mean(terms) if average else total(terms)

    return loss


def per_response(with_kl: bool, generator: Any = None) -> Any:
    """DPO, BPO, TDPO1 and BPO-A: one ratio for the whole responses."""

    def loss(w: Response, l: Response, _: Any, *, beta, label_smoothing, **more: Any):  # noqa: E741
        score = total(rho(token) for token in l) - total(rho(token) for token in w)
        if with_kl:
            score = score + total(t["kl"] for t in l) - total(t["kl"] for t in w)
        return noisy(generator or more["ell"], beta * score, label_smoothing)

    return loss


def robust_dpo(w, l, _, *, beta, label_smoothing):  # noqa: E741
    margin = beta * (total(map(rho, w)) - total(map(rho, l)))
    clean, flipped = -torch.log(torch.sigmoid(margin)), -torch.log(torch.sigmoid(-margin))
    share = label_smoothing
    return ((1 - share) * clean - share * flipped) / (1 - 2 * share)


def tdpo2(w, l, _, *, beta, label_smoothing, tdpo_alpha):  # noqa: E741
    margin = beta * (total(map(rho, w)) - total(map(rho, l)))
    of_chosen = total(token["kl"].detach() for token in w)
    margin = margin - tdpo_alpha * beta * (total(token["kl"] for token in l) - of_chosen)
    return noisy(logistic, -margin, label_smoothing)


def ipo(w, l, _, *, beta, label_smoothing):  # noqa: E741
    margin = mean(map(rho, w)) - mean(map(rho, l))
    aim = 1 / (2 * beta)
    return (1 - label_smoothing) * (margin - aim) ** 2 + label_smoothing * (margin + aim) ** 2


def simpo(w, l, _, *, beta, label_smoothing, simpo_gamma):  # noqa: E741
    reward = beta * (mean(token["p"] for token in w) - mean(token["p"] for token in l))
    return noisy(logistic, -(reward - simpo_gamma), label_smoothing)


def tis_dpo(w, l, _, *, beta, label_smoothing, tis_lower, tis_upper):  # noqa: E741
    def clamped(token: Token) -> float:
        return min(max(token["c"].item(), tis_lower), tis_upper)

    chosen = total(math.exp(clamped(token)) * rho(token) for token in w)
    rejected = total(math.exp(-clamped(token)) * rho(token) for token in l)
    return noisy(logistic, -beta * (chosen - rejected), label_smoothing)


def sepo(w, l, _, *, beta, label_smoothing, sepo_share):  # noqa: E741
    def select(response: Response, best: int) -> Tensor:
        count = max(1, math.floor(sepo_share * len(response) + 1e-9))
        ordered = sorted(response, key=lambda token: -best * token["c"].item())
        return mean(token["p"] for token in ordered[:count])

    return noisy(logistic, -beta * (select(w, 1) - select(l, -1)), label_smoothing)


def t_reg(w, l, _, *, beta, label_smoothing, t_reg_weight):  # noqa: E741
    margin = beta * (total(map(rho, w)) - total(map(rho, l)))
    tied = total((torch.sigmoid(token["c"].detach()) - 0.5) * token["p"] for token in [*w, *l])
    pair_weight = 1 / (1 + math.exp(float(margin.detach())))
    dpo = noisy(logistic, -margin, label_smoothing)
    return dpo - t_reg_weight * pair_weight * beta * tied


def chunks(response: Response, longest: int) -> list[Response]:
    """As few runs as may be, each as long as the others or shorter by one."""
    count = math.ceil(len(response) / longest)
    return [
        [x for t, x in enumerate(response) if t * count // len(response) == k] for k in range(count)
    ]


def arc_bpo(w, l, _, *, beta, h, h_prime, arc_chunk_length, arc_target_margin):  # noqa: E741
    loss = torch.zeros((), dtype=torch.float64)
    for response, sign in ((w, 1), (l, -1)):
        parts = chunks(response, arc_chunk_length)
        target = sign * arc_target_margin / 2 / len(parts)
        terms = []
        for part in parts:
            ratio = torch.exp(-beta * total(map(rho, part)))
            goal = torch.tensor(math.exp(-target), dtype=torch.float64)
            terms.append(h(goal) - h(ratio) - h_prime(ratio) * (goal - ratio))
        loss = loss + mean(terms)
    return loss


def sft(w, _l, _):
    return -total(token["p"] for token in w)


ORACLES = {
    "tbpo_a": per_token("kl", True),
    "tbpo_q": per_token("baseline", True),
    "tbpo": per_token("none", True),
    "adpo": per_token("none", False, logistic),
    "dpo": per_response(False, logistic),
    "robust_dpo": robust_dpo,
    "bpo": per_response(False),
    "bpo_a": per_response(True),
    "tdpo1": per_response(True, logistic),
    "tdpo2": tdpo2,
    "ipo": ipo,
    "simpo": simpo,
    "tis_dpo": tis_dpo,
    "sepo": sepo,
    "t_reg": t_reg,
    "arc_bpo": arc_bpo,
    "sft": sft,
}


def by_hand(name: str, pair: Any, **settings: Any) -> Tensor:
    """The loss of each pair of statistics, from the oracle of that name."""

    def response(side: Any, row: int) -> Response:
        return [
            {
                key: getattr(side, field)[row, t]
                for key, field in (
                    ("p", "log_probs"),
                    ("q", "ref_log_probs"),
                    ("kl", "kl"),
                    ("c", "contrast"),
                )
            }
            for t in range(int(side.mask[row].sum()))
        ]

    losses = [
        ORACLES[name](
            response(pair.chosen, row),
            response(pair.rejected, row),
            pair.log_state_weight[row],
            **settings,
        )
        for row in range(len(pair.chosen.mask))
    ]
    return torch.stack(losses)
