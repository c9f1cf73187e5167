"""Settings of the judges that run a model; their classes, which import torch, load on use."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.protocol import JudgeContext
from tokenratio.models.template_options import TemplateOptions, template_of
from tokenratio.names import require_at_least
from tokenratio.settings import option

if TYPE_CHECKING:
    from tokenratio.evaluation.judges.implicit import ImplicitRewardJudge
    from tokenratio.evaluation.judges.reward_model import RewardModelJudge


@dataclass
class RewardModelSettings(TemplateOptions):
    """A sequence classifier with one output."""

    required: ClassVar[tuple[str, ...]] = ("model",)

    model: str = option("", "Hub name or folder of the reward model.")
    batch_size: int = option(16, "Number of rows per batch.")
    max_length: int | None = option(
        None, "Maximum tokens of a row; longer ones get no verdict. Default: the model's limit."
    )
    as_chat: bool = option(True, "Use the chat template, if the tokenizer has one.")

    def __post_init__(self) -> None:
        require_at_least(1, batch_size=self.batch_size, max_length=self.max_length)

    def make(self, context: JudgeContext) -> "RewardModelJudge":
        from tokenratio.evaluation.judges.reward_model import RewardModelJudge
        from tokenratio.models.device import default_device
        from tokenratio.models.loading import load_tokenizer
        from tokenratio.run_folder import read_run_file

        tokenizer, template = template_of(
            self, load_tokenizer(self.model), self.model, day=context.day, report=context.report
        )
        return RewardModelJudge.load(
            self.model,
            {"device_map": str(default_device())},
            tokenizer=tokenizer,
            template=template,
            as_chat=self.as_chat,
            as_trained=(read_run_file(self.model) or {}).get("kind") == "reward model",
            batch_size=self.batch_size,
            max_length=self.max_length,
        )


@dataclass
class ImplicitSettings(TemplateOptions):
    """A policy's implicit reward: β times its log-ratio to a reference."""

    required: ClassVar[tuple[str, ...]] = ("policy",)

    policy: str = option("", "Hub name, folder or GGUF file of the policy.")
    reference: str | None = option(
        None, "Hub name, folder or GGUF file of its reference. Default: that of the evaluation."
    )
    beta: float = option(0.1, "Scale of the reward; which response wins does not depend on it.")
    batch_size: int = option(16, "Number of rows per batch.")
    max_length: int | None = option(
        None, "Longest row in tokens; longer responses are cut on the right."
    )
    max_prompt_length: int | None = option(
        None, "Longest prompt in tokens; longer ones are cut on the left."
    )

    def __post_init__(self) -> None:
        require_at_least(1, batch_size=self.batch_size, max_length=self.max_length)
        require_at_least(1, max_prompt_length=self.max_prompt_length)

    def make(self, context: JudgeContext) -> "ImplicitRewardJudge":
        from tokenratio.evaluation.judges.implicit import ImplicitRewardJudge
        from tokenratio.models.loading import load_tokenizer

        reference = self.reference or context.reference
        if reference is None:
            raise TokenRatioError("judge implicit needs reference")
        tokenizer, template = template_of(
            self, load_tokenizer(self.policy), self.policy, day=context.day, report=context.report
        )
        return ImplicitRewardJudge(
            context.load_model(self.policy),
            tokenizer,
            template=template,
            ref_model=context.load_model(reference),
            beta=self.beta,
            name=self.policy,
            batch_size=self.batch_size,
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
        )
