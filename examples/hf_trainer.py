"""LoRA on any Hugging Face classifier, trained by transformers.Trainer.

    pip install transformers accelerate
    python examples/hf_trainer.py --model=roberta-base --dataset=rotten_tomatoes --targets='query|output' --rank=4

The data set is anything that train.py reads: a name, a file or a directory. All of Trainer's flags work too.
"""

import os
import sys
from dataclasses import dataclass

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from dataloader import CustomDataLoader
from lora import attach_lora, mark_only_lora_as_trainable
from plumbing.adapters.peft_format import save_adapter
from plumbing.adapters.trainable import parameter_report
from plumbing.program.errors import one_line_errors


@dataclass
class Args:
    model: str = "roberta-base"  # a name on the hub or a directory
    dataset: str = "rotten_tomatoes"
    text_field: str = "text"
    words: str | None = None  # for the labels 0, 1, ... (train.py's --label_names)
    targets: str = "query|output"  # regular expression: the layers that get an adapter
    trainable: str = "classifier|score"  # regular expression: parameters trained beside it
    rank: int = 4
    alpha: float = 16.0
    max_length: int = 128  # tokens of a text


parser = HfArgumentParser((Args, TrainingArguments))
parser.set_defaults(output_dir="out-hf", learning_rate=1e-3, per_device_train_batch_size=32, report_to="none")
parser.set_defaults(eval_strategy="epoch", save_strategy="no", logging_steps=50)
args, training = parser.parse_args_into_dataclasses()
set_seed(training.seed)
with one_line_errors():
    splits = ("train", "validation", "test")
    data = CustomDataLoader(
        args.dataset, text_field=args.text_field, label_names=args.words, wanted=splits, classify=True
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # GPT-2 has none
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(data.label_names))
    model.config.pad_token_id = tokenizer.pad_token_id
    attach_lora(model, args.targets, args.rank, args.alpha)
    mark_only_lora_as_trainable(model, also=args.trainable)
print(parameter_report(model))


def rows(split):
    texts = [ex.text for ex in data.splits[split]]
    tokens = tokenizer(texts, truncation=True, max_length=args.max_length)["input_ids"]
    return [{"input_ids": ids, "labels": ex.label} for ids, ex in zip(tokens, data.splits[split])]


trainer = Trainer(
    model,
    training,
    train_dataset=rows("train"),
    eval_dataset=rows("validation"),
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
)
trainer.train()
print(trainer.evaluate(rows("test"), metric_key_prefix="test"))
save_adapter(model, training.output_dir, base_model=args.model, also=args.trainable)
print(f"saved: {training.output_dir}/adapter_model.safetensors")
