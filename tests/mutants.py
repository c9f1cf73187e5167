"""Break the mathematics on purpose, one named fault at a time, and demand that the tests notice.

`python tests/mutants.py [part of a name ...]` copies `src` and `tests` to a temporary folder, makes
one edit there, and runs the test files that must fail, each until its first failure; the faults are
dealt out to one process per processor. Exit code 1 if a fault survives one of the files, if the
text it replaces is not there exactly once, or if the unmodified copy does not pass.
"""

import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import pytest
import torch

WRONG_PACKAGE = 99  # the exit code when the tests would import another tokenratio than the copy
# What tests and library import, by modules that are loaded lazily otherwise.
IMPORTED_ONCE = ("transformers.tokenization_utils_tokenizers", "transformers.trainer")
IMPORTED_ONCE += ("datasets", "peft", "trl.trainer.dpo_trainer")
NOT_PASSING = 255  # the exit code of a search that did not come to an end
ROOT = Path(__file__).resolve().parents[1]
BREGMAN, RATIOS, TYPES = "tests/test_bregman.py", "tests/test_ratios.py", "tests/test_types.py"
STATISTICS, MDP = "tests/statistics/test_token_statistics.py", "tests/theory/test_mdp.py"
TBPO, SEQUENCE = "tests/losses/test_tbpo.py", "tests/losses/test_sequence.py"
EVERY, SPACE = "tests/losses/test_every_loss.py", "tests/losses/test_space.py"
TOKEN, SMOOTHING = "tests/losses/test_token.py", "tests/losses/test_label_smoothing.py"
TRL = "tests/losses/test_trl.py"
POPULATION = "tests/theory/test_population.py"
TRAINER, RESUME = "tests/training/test_trainer.py", "tests/training/test_resume.py"
TRAINER_GRADIENT = "tests/training/test_objective.py"
STEPS, PACKING = "tests/statistics/test_step_losses.py", "tests/models/test_packing.py"
PRODUCTS = "tests/statistics/test_products.py"
COLLATOR = "tests/data/test_steps.py"
CREDIT_METHODS = "tests/report/test_credit_methods.py"
CREDIT = "tests/report/test_credit.py"


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in `src/tokenratio/<file>`; each of `tests` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


LOG_RATIO = "beta * (rejected_log_ratio - chosen_log_ratio + log_state_weight)"
CENTRE = (
    "        mean = log_weight.sum(-1, keepdim=True) / "
    "pair_mask.sum(-1, keepdim=True).clamp_min(1)\n"
)

FAULTS = (
    # docs/method.md §2: log R_t = β (ρ^l − ρ^w + log w_t), t ≤ min(|y^w|, |y^l|).
    Fault(
        "sign of u",
        "ratios.py",
        LOG_RATIO,
        "beta * (chosen_log_ratio - rejected_log_ratio - log_state_weight)",
        (RATIOS, TBPO, POPULATION),
    ),
    Fault(
        "sign of log w",
        "ratios.py",
        "return rejected_kl - chosen_kl",
        "return chosen_kl - rejected_kl",
        (RATIOS, TBPO, POPULATION),
    ),
    Fault(
        "beta missing on log w",
        "ratios.py",
        LOG_RATIO,
        "beta * (rejected_log_ratio - chosen_log_ratio) + log_state_weight",
        (RATIOS, TBPO, POPULATION),
    ),
    Fault(
        "T = max in the batch",
        "types.py",
        "return chosen & rejected",
        "return chosen | rejected",
        (TYPES,),
    ),
    Fault(
        "T = max in the statistics",
        "types.py",
        "return self.chosen.mask & self.rejected.mask",
        "return self.chosen.mask | self.rejected.mask",
        (TYPES, TBPO),
    ),
    Fault(
        "off-by-one states",
        "types.py",
        "self.completion_mask.roll(-1, dims=1)",
        "self.completion_mask",
        (TYPES, TBPO, MDP),
    ),
    Fault(
        "responses aligned on their last token",
        "types.py",
        "return steps < lengths[:, None]",
        "return steps >= lengths.max() - lengths[:, None]",
        (TYPES, TBPO),
    ),
    # docs/method.md §3, §9: the generators and the mean over a pair's tokens.
    Fault(
        "the released LSIF",
        "bregman.py",
        "return (2 * log_ratio).exp() / 2 - (-log_ratio).exp()",
        "return (2 * log_ratio).exp() - 2 * log_ratio.exp()",
        (BREGMAN, TBPO, POPULATION),
    ),
    Fault(
        "LSIF's slope",
        "bregman.py",
        "return (2 * log_ratio).exp() + (-log_ratio).exp()",
        "return (2 * log_ratio).exp() - (-log_ratio).exp()",
        (BREGMAN,),
    ),
    Fault(
        "BA scaled like SBA",
        "bregman.py",
        "scale=1 / (1 + self.lam)",
        "scale=1.0",
        (BREGMAN, TBPO),
    ),
    Fault(
        "cancellation at lambda 0",
        "bregman.py",
        "return torch.expm1(lam * log_value) / lam",
        "return ((lam * log_value).exp() - 1) / lam",
        (BREGMAN,),
    ),
    Fault(
        "lambda of -1 accepted",
        "bregman.py",
        "math.isfinite(lam) and lam > -1",
        "math.isfinite(lam) and lam >= -1",
        (BREGMAN,),
    ),
    Fault(
        "mean over padding",
        "losses/ratio_matching.py",
        "pair_mask.sum(-1).clamp_min(1)",
        "max(pair_mask.shape[-1], 1)",
        (TBPO,),
    ),
    Fault(
        "output masked, not input",
        "losses/ratio_matching.py",
        "self.per_step(pair.steps[mask], **settings)",
        "(self.per_step(pair.steps, **settings) * mask)[mask]",
        (TBPO, EVERY),
    ),
    Fault(
        "empty overlap divides by zero",
        "losses/ratio_matching.py",
        "pair_mask.sum(-1).clamp_min(1)",
        "pair_mask.sum(-1)",
        (TBPO,),
    ),
    Fault(
        "DPO averaged over tokens",
        "losses/ratio_matching.py",
        "log_ratio.sum(-1),",
        "log_ratio.mean(-1),",
        (SEQUENCE, TBPO, EVERY, TRL, POPULATION),
    ),
    # docs/method.md §4: the state weights.
    Fault(
        "clamp before centring",
        "ratios.py",
        "(rejected_baseline - chosen_baseline).masked_fill(~pair_mask, 0.0)",
        "(rejected_baseline - chosen_baseline).masked_fill(~pair_mask, 0.0).clamp(-clamp, clamp)",
        (RATIOS,),
    ),
    Fault(
        "centring over padding",
        "ratios.py",
        CENTRE,
        "        mean = log_weight.mean(-1, keepdim=True)\n",
        (RATIOS,),
    ),
    Fault(
        "centred by default",
        "ratios.py",
        "center: bool = False",
        "center: bool = True",
        (RATIOS, TBPO),
    ),
    Fault(
        "detached KL in the state weight",
        "ratios.py",
        "return rejected_kl - chosen_kl",
        "return (rejected_kl - chosen_kl).detach()",
        (RATIOS, TBPO, POPULATION),
    ),
    Fault(
        "detached KL in the statistics",
        "statistics/fused.py",
        "        if ref_log_probs is not None:\n"
        "            ctx.mark_non_differentiable(ref_log_probs)\n",
        "        ctx.mark_non_differentiable(*(x for x in (ref_log_probs, kl) if x is not None))\n",
        (STATISTICS, TBPO, POPULATION),
    ),
    Fault(
        "detached KL in the one pass",
        "statistics/steps.py",
        "logit_gradient(probs, ref_probs, of_chunk, d_log_probs, d_kl)",
        "logit_gradient(probs, ref_probs, of_chunk, d_log_probs, None)",
        (STEPS, TRAINER_GRADIENT),
    ),
    Fault(
        "K3 on the data token",
        "statistics/steps.py",
        "else kl.unbind()",
        "else (log_ratio.expm1() - log_ratio).unbind()",
        (TRAINER_GRADIENT,),
    ),
    Fault(
        "reversed KL, fused",
        "statistics/chunks.py",
        "difference = log_q.sub_(log_p)",
        "difference, p, q = (log_p - log_q), q, p",
        (STATISTICS, STEPS, TBPO, POPULATION),
    ),
    Fault(
        "reversed KL, reference",
        "statistics/reference.py",
        "kl_terms(log_probs, ref_log_probs)",
        "kl_terms(ref_log_probs, log_probs)",
        (STATISTICS,),
    ),
    # docs/method.md §5: the computation.
    Fault(
        "cancelling KL",
        "statistics/reference.py",
        "ref_log_probs.exp() * (torch.expm1(-above) + above) + log_probs.exp() * (\n"
        "        below * shrink + (below - shrink)\n    )",
        "ref_log_probs.exp() * difference + 0 * shrink * above",
        (STATISTICS,),
    ),
    Fault(
        "cancelling KL, fused",
        "statistics/chunks.py",
        "kl = torch.linalg.vecdot(q, torch.expm1(-above).add_(above))",
        "return log_probs, ref_log_probs, torch.linalg.vecdot(q, difference)",
        (STATISTICS, STEPS),
    ),
    Fault(
        "overflowing KL",
        "statistics/reference.py",
        "above, below = difference.clamp(min=0), difference.clamp(max=0)",
        "above, below = difference, torch.zeros_like(difference)",
        (STATISTICS,),
    ),
    Fault(
        "half of the KL, fused",
        "statistics/chunks.py",
        "    kl += torch.linalg.vecdot(p, rest.addcmul_(below, shrink))\n",
        "",
        (STATISTICS, STEPS),
    ),
    Fault(
        "sign of p_ref in the gradient",
        "statistics/chunks.py",
        "grad_kl[:, None], value=-1)",
        "grad_kl[:, None], value=1)",
        (STATISTICS, STEPS, TBPO, POPULATION),
    ),
    Fault(
        "KL's p missing in the gradient",
        "statistics/chunks.py",
        "probs *= (grad_kl - grad_log_probs)[:, None]",
        "probs *= (-grad_log_probs)[:, None]",
        (STATISTICS, STEPS, TBPO, POPULATION),
    ),
    Fault(
        "soft-cap missing in the backward",
        "statistics/fused.py",
        "                if slack is not None:\n                    d_logits *= slack\n",
        "",
        (STATISTICS,),
    ),
    Fault(
        "soft-cap missing in the one pass",
        "statistics/steps.py",
        "                if slack is not None:\n                    d_logits *= slack\n",
        "",
        (STEPS,),
    ),
    Fault(
        "steps weigh alike",
        "statistics/steps.py",
        "torch.autograd.grad((loss * step_weight).sum(),",
        "torch.autograd.grad(loss.sum(),",
        (STEPS, TRAINER_GRADIENT),
    ),
    Fault(
        "upstream gradient forgotten",
        "statistics/steps.py",
        "gradients[index].mul_(grad_total).to(dtype)",
        "gradients[index].to(dtype)",
        (STEPS,),
    ),
    Fault(
        "gradient of log w forgotten",
        "statistics/steps.py",
        "d_state[chunk] = d_log_weight",
        "d_state[chunk] = 0 * d_log_weight",
        (STEPS, TRAINER_GRADIENT),
    ),
    # docs/method.md §5: what is left out, and what is shared.
    Fault(
        "one token too many cut",
        "data/steps.py",
        "cut = [length - 1 if self.prune else None for length in lengths]",
        "cut = [max(length - 2, 0) if self.prune else None for length in lengths]",
        (COLLATOR,),
    ),
    Fault(
        "positions not reset",
        "data/collation.py",
        "first = len(parts[0]) if number else 0",
        "first = begin",
        (COLLATOR, TRAINER_GRADIENT),
    ),
    Fault(
        "first rejected state on the chosen branch",
        "data/steps.py",
        "            place[0] = len(prompt) - 1\n",
        "",
        (COLLATOR, TRAINER_GRADIENT),
    ),
    Fault(
        "branch leak",
        "models/packing.py",
        "((key == 0) | (key == branch[:, :, None]))",
        "(key >= 0)",
        (PACKING, TRAINER_GRADIENT),
    ),
    Fault(
        "window off by one",
        "models/packing.py",
        "position_ids[:, None, :] < window)",
        "position_ids[:, None, :] <= window)",
        (PACKING,),
    ),
    Fault(
        "gradient into the tied reference",
        "statistics/__init__.py",
        "    ref_head = (ref_head or head).detach()\n"
        "    ref_hidden = _checked(hidden, head, labels, ref_hidden, ref_head, chunk_size)\n"
        "    if impl",
        "    ref_head = ref_head or head\n"
        "    ref_hidden = _checked(hidden, head, labels, ref_hidden, ref_head, chunk_size)\n"
        "    if impl",
        (STATISTICS,),
    ),
    Fault(
        "logits rounded to bfloat16",
        "statistics/head.py",
        "dtype = torch.float32",
        "dtype = torch.bfloat16",
        (STATISTICS,),
    ),
    Fault(
        "the difference of the logits alone",
        "statistics/products.py",
        "return logits.add_(ref_logits), ref_logits",
        "return logits, ref_logits",
        (PRODUCTS,),
    ),
    Fault(
        "two heads taken for one",
        "statistics/products.py",
        "is_one_head = reference.is_same(policy)",
        "is_one_head = True",
        (PRODUCTS,),
    ),
    Fault(
        "whole logits in one chunk",
        "statistics/fused.py",
        "for start in range(0, len(labels), chunk_size):",
        "chunk_size = 10**6\n            for start in range(0, len(labels), chunk_size):",
        (STATISTICS,),
    ),
    Fault(
        "twice differentiable, wrongly",
        "statistics/fused.py",
        "    @once_differentiable\n",
        "",
        (STATISTICS,),
    ),
    # docs/method.md §1: Q_ref is the reference's, not the soft optimum's.
    Fault(
        "soft-optimal Q",
        "theory/mdp.py",
        "following = (self.ref_log_probs[rows].exp() * q[rows]).sum(-1)",
        "following = (self.ref_log_probs[rows] + q[rows]).logsumexp(-1)",
        (MDP, POPULATION),
    ),
    # docs/method.md §6, §11: the methods that TBPO is compared with.
    Fault(
        "smoothing: the same loss twice",
        "losses/ratio_matching.py",
        "generator.loss(-pair_log_ratio)",
        "generator.loss(pair_log_ratio)",
        (EVERY, SMOOTHING, TRL, TRAINER_GRADIENT),
    ),
    Fault(
        "robust_dpo: sign of the correction",
        "losses/ratio_matching.py",
        "* loss - label_smoothing * flipped",
        "* loss + label_smoothing * flipped",
        (EVERY, SMOOTHING, TRL, POPULATION),
    ),
    Fault(
        "adpo: a mean",
        "losses/__init__.py",
        '"sum"',
        '"mean"',
        (EVERY, SPACE),
    ),
    Fault(
        "tdpo2: the other KL held still",
        "losses/ratio_matching.py",
        "kl_state_weight(steps.chosen_kl.detach(), steps.rejected_kl)",
        "kl_state_weight(steps.chosen_kl, steps.rejected_kl.detach())",
        (EVERY, SPACE, TRAINER_GRADIENT),
    ),
    Fault(
        "tdpo2: alpha is not the user's",
        "losses/ratio_matching.py",
        'settings.pop("tdpo_alpha", None)',
        'settings.pop("tdpo_alpha", None) and self.settings["tdpo_alpha"]',
        (EVERY, SPACE, TRAINER_GRADIENT),
    ),
    Fault(
        "ipo: sums, not means",
        "losses/sequence.py",
        "ipo_loss(*(_per_token(side, side.log_ratio) for side in sides)",
        "ipo_loss(*(side.log_ratio.sum(-1) for side in sides)",
        (EVERY, SEQUENCE, TRL, TRAINER_GRADIENT),
    ),
    Fault(
        "simpo: beta scales the margin",
        "losses/sequence.py",
        "beta * (rejected_log_prob - chosen_log_prob) + gamma",
        "beta * (rejected_log_prob - chosen_log_prob + gamma)",
        (EVERY, SEQUENCE, TRL, TRAINER_GRADIENT),
    ),
    Fault(
        "anchor: a sum over tokens",
        "losses/sequence.py",
        "return sft_loss(log_probs, mask) / mask.sum(-1).clamp_min(1)",
        "return sft_loss(log_probs, mask)",
        (SEQUENCE, TRL, TRAINER_GRADIENT),
    ),
    Fault(
        "tis_dpo: rejected weighed like chosen",
        "losses/token_weighted.py",
        "upper=tis_upper)\n        for side, sign in ((chosen, 1), (rejected, -1))",
        "upper=tis_upper)\n        for side, sign in ((chosen, 1), (rejected, 1))",
        (EVERY, TOKEN),
    ),
    Fault(
        "tis_dpo: clamped after the sign",
        "losses/token_weighted.py",
        "(sign * contrast.clamp(lower, upper)).exp()",
        "(sign * contrast).clamp(lower, upper).exp()",
        (EVERY, TOKEN),
    ),
    Fault(
        "sepo: top and bottom change places",
        "losses/token_weighted.py",
        "sepo_selection(sign * _contrast(side)",
        "sepo_selection(-sign * _contrast(side)",
        (EVERY, TOKEN),
    ),
    Fault(
        "sepo: padding is a candidate",
        "losses/token_weighted.py",
        "score.masked_fill(~mask, -math.inf)",
        "score",
        (EVERY, TOKEN),
    ),
    Fault(
        "sepo: a share of 2.999 is 2",
        "losses/token_weighted.py",
        " + 1e-6).floor()",
        ").floor()",
        (TOKEN,),
    ),
    Fault(
        "sepo: nothing of a short response",
        "losses/token_weighted.py",
        ".floor().long().clamp_min(1)",
        ".floor().long()",
        (EVERY, TOKEN),
    ),
    Fault(
        "t_reg: pair weight not held still",
        "losses/token_weighted.py",
        "log_ratio.detach().sigmoid()",
        "log_ratio.sigmoid()",
        (EVERY, TOKEN),
    ),
    Fault(
        "t_reg: rejected rewards turned round",
        "losses/token_weighted.py",
        "(rejected_contrast, rejected_log_probs),",
        "(rejected_contrast, -rejected_log_probs),",
        (EVERY, TOKEN),
    ),
    Fault(
        "arc_bpo: each target the whole margin",
        "losses/token_weighted.py",
        "half = target_margin / 2",
        "half = target_margin",
        (EVERY, TOKEN, TRAINER_GRADIENT),
    ),
    Fault(
        "arc_bpo: targets not shared by chunks",
        "losses/token_weighted.py",
        "target = (margin / counts.clamp_min(1))[:, None]",
        "target = (margin / torch.ones_like(counts))[:, None]",
        (EVERY, TOKEN, TRAINER_GRADIENT),
    ),
    Fault(
        "arc_bpo: the last chunk is the short one",
        "losses/token_weighted.py",
        "steps * counts // lengths.clamp_min(1)",
        "steps // chunk_length",
        (EVERY, TOKEN, TRAINER_GRADIENT),
    ),
    Fault(
        "arc_bpo: divergence the other way round",
        "losses/token_weighted.py",
        "goal, ratio = (-target).exp(), (-reward).exp()",
        "ratio, goal = (-target).exp(), (-reward).exp()",
        (EVERY, TOKEN, TRAINER_GRADIENT),
    ),
    Fault(
        "arc_bpo: rejected drawn where chosen are",
        "losses/token_weighted.py",
        "rejected_log_ratio, rejected_mask, -half",
        "rejected_log_ratio, rejected_mask, half",
        (EVERY, TOKEN, TRAINER_GRADIENT),
    ),
    # The same faults where the trainer wires the parts together.
    Fault(
        "trainer: detached KL",
        "training/objective.py",
        'sides(answer.get("kl_ref_policy"))',
        'sides(answer["kl_ref_policy"].detach() if "kl_ref_policy" in answer else None)',
        (TRAINER_GRADIENT,),
    ),
    Fault(
        "trainer: K3 on the data token",
        "training/objective.py",
        'sides(answer.get("kl_ref_policy"))',
        'sides((lambda d: d.exp() - 1 - d)(answer["log_probs"] - answer["ref_log_probs"])'
        ' if "kl_ref_policy" in answer else None)',
        (TRAINER, TRAINER_GRADIENT),
    ),
    Fault(
        "trainer: a sum divided by its steps",
        "training/objective.py",
        "torch.ones_like(batch.lengths) if self._is_sum else batch.lengths",
        "batch.lengths",
        (TRAINER_GRADIENT,),
    ),
    Fault(
        "trainer: baseline cut to the overlap",
        "training/objective.py",
        "batch.pair_mask if self.method.is_local else is_either",
        "batch.pair_mask",
        (TRAINER_GRADIENT,),
    ),
    Fault(
        "trainer: the anchor without its weight",
        "training/objective.py",
        "loss = loss + sft_weight * anchor",
        "loss = loss + anchor",
        (TRAINER_GRADIENT,),
    ),
    Fault(
        "trainer: hidden state of the baseline off by one",
        "models/token_requests.py",
        "weigh(hidden)",
        "weigh(hidden.roll(1, 0))",
        (TRAINER_GRADIENT,),
    ),
    Fault(
        "trainer: gradient of b into the backbone",
        "models/state_baseline.py",
        "hidden.detach().to(",
        "hidden.to(",
        (TRAINER_GRADIENT,),
    ),
    Fault(
        "trainer: reference with its adapter on",
        "models/reference.py",
        "with adapters.disable_adapter():",
        "if True:",
        (TRAINER,),
    ),
    Fault(
        "trainer: mean of batch means under accumulation",
        "training/pair_trainer.py",
        "processes, weight = self.accelerator.num_processes, num_items_in_batch",
        "processes, weight = 1, self.args.objective.weight(inputs) "
        "* self.args.gradient_accumulation_steps",
        (TRAINER,),
    ),
    Fault(
        "trainer: the state baseline is not resumed",
        "training/trainer.py",
        "load_baseline(self.baseline, checkpoint)",
        "pass",
        (RESUME,),
    ),
    Fault(
        "trainer: the baseline's optimizer is not resumed",
        "training/trainer.py",
        "load_optimizer(self._baseline_optimizer, checkpoint / OPTIMIZER_FILE)",
        "pass",
        (RESUME,),
    ),
    # The token-credit viewer shows what the losses compute.
    Fault(
        "credit viewer: the weight of a step is that of the mean",
        "report/credit_methods.py",
        'found["slope"] = found["slope"] * shared.sum(-1, keepdim=True)',
        "pass",
        (CREDIT_METHODS,),
    ),
    Fault(
        "credit viewer: the push on a token has the gradient's sign",
        "report/credit_methods.py",
        "pushes = (-chosen * pair.chosen.mask",
        "pushes = (chosen * pair.chosen.mask",
        (CREDIT_METHODS, CREDIT),
    ),
    Fault(
        "credit viewer: policy and reference exchanged",
        "models/token_values.py",
        "return self.log_probs - self.ref_log_probs",
        "return self.ref_log_probs - self.log_probs",
        (CREDIT,),
    ),
    Fault(
        "credit viewer: the reference's likeliest tokens are left out",
        "statistics/predictions.py",
        "likeliest = [each.topk(top).indices for each in (logits, ref_logits)]",
        "likeliest = [logits.topk(top).indices] * 2",
        (CREDIT,),
    ),
)


class FirstFailures:
    """pytest plugin: a file that has failed runs no further test."""

    def __init__(self) -> None:
        self.failed: set[str] = set()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.location[0] in self.failed:
            pytest.skip("another test of the file has failed")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.location[0])


class Copy:
    """A private copy of sources and tests, and pytest on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignore = shutil.ignore_patterns("__pycache__")
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", folder)

    def pytest(self, *tests: str) -> tuple[int, str]:
        """Exit code and output, from a fork: torch is imported once, `tokenratio` in each child."""
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                self._run_and_exit(tests, output.fileno())
            _, status = os.waitpid(child, 0)
            output.seek(0)
            return os.waitstatus_to_exitcode(status), output.read().decode()

    def _run_and_exit(self, tests: tuple[str, ...], output: int) -> NoReturn:
        code = WRONG_PACKAGE
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(self.folder)
            # No bytecode: an edit within one second that keeps a file's size would not be seen.
            sys.dont_write_bytecode = True
            sys.path[0] = str(self.folder / "src")
            import tokenratio

            if Path(str(tokenratio.__file__)).is_relative_to(self.folder):
                options = ["-q", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
                # transformers has loaded a pytest plugin's package before pytest could rewrite it.
                options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
                code = int(pytest.main([*options, *tests], plugins=[FirstFailures()]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def survivors(self, fault: Fault) -> tuple[list[str], str]:
        """The test files that do not notice the fault, and the first test that does."""
        path = self.folder / "src" / "tokenratio" / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            times = text.count(fault.old)
            sys.exit(f"{fault.name}: {fault.old!r} is {times} times in {fault.file}, not once")
        path.write_text(text.replace(fault.old, fault.new))
        try:
            code, output = self.pytest(*fault.tests)
        finally:
            path.write_text(text)
        failed = dict(re.findall(r"^FAILED ([^\s:]+)::(\S+)", output, re.M))
        if code != 1:  # all passed, or a file could not even be collected
            failed = {}
        unnoticed = [f"{test} (exit code {code})" for test in fault.tests if test not in failed]
        return unnoticed, next(iter(failed.values()), "")


def search(faults: Sequence[Fault]) -> int:
    """Number of faults that survive in a copy of their own, or `NOT_PASSING` without any fault."""
    with tempfile.TemporaryDirectory(prefix="tokenratio-mutants-") as folder:
        copy = Copy(Path(folder).resolve())
        code, output = copy.pytest(*sorted({test for fault in faults for test in fault.tests}))
        if code != 0:
            print(output[-3000:], f"the unmodified copy does not pass (exit code {code})", sep="\n")
            return NOT_PASSING
        survived = 0
        for fault in faults:
            unnoticed, first = copy.survivors(fault)
            survived += bool(unnoticed)
            verdict = "SURVIVED " + ", ".join(unnoticed) if unnoticed else "caught"
            print(f"{fault.name:40} {verdict:10} {len(fault.tests)} of files  {first}", flush=True)
        return survived


def start_search(faults: Sequence[Fault]) -> int:
    """The process id of a fork that exits with what `search` returns."""
    child = os.fork()
    if child == 0:
        code = NOT_PASSING
        try:
            code = search(faults)
        except SystemExit as error:  # a fault whose text is not there
            print(error, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def main(parts: list[str]) -> int:
    torch.set_num_threads(1)
    for name in IMPORTED_ONCE:
        import_module(name)
    faults = [f for f in FAULTS if not parts or any(part in f.name for part in parts)]
    processes = min(len(os.sched_getaffinity(0)), len(faults))
    children = [start_search(faults[first::processes]) for first in range(processes)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if not all(0 <= code < NOT_PASSING for code in codes):
        return 1
    print(f"{len(faults) - sum(codes)} of {len(faults)} faults caught")
    return 1 if sum(codes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
