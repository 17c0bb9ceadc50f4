"""LoRA on any Hugging Face classifier, trained by transformers.Trainer.

    pip install transformers accelerate
    python examples/hf_trainer.py --model=roberta-base --dataset=rotten_tomatoes --targets='query|output' --rank=4
    python examples/hf_trainer.py --dataset=sst2 --text_field=sentence --also_full=True --ray=auto

The data set is anything that train.py reads: a name, a file or a directory. All of Trainer's flags work too. With
--also_full the whole model is trained as well, and with --ray each training is a task of Ray's.
"""

import os
import sys
from dataclasses import dataclass, replace

import transformers

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from dataloader import CustomDataLoader
from lora import attach_lora, mark_only_lora_as_trainable, save_adapter
from plumbing.adapters.trainable import parameter_report
from plumbing.program.errors import one_line_errors
from plumbing.program.files import ROOT


@dataclass
class Args:
    model: str = "roberta-base"  # a name on the hub or a directory
    dataset: str = "rotten_tomatoes"
    text_field: str = "text"
    words: str | None = None  # for the labels 0, 1, ... (train.py's --label_names)
    targets: str = "query|output"  # regular expression: the layers that get an adapter
    trainable: str = "classifier|score"  # regular expression: parameters trained beside it
    rank: int = 4  # 0: every weight is trained
    alpha: float = 16.0
    max_length: int = 128  # tokens of a text
    also_full: bool = False  # a second training, of every weight
    full_lr: float = 2e-5  # its learning rate
    ray: str | None = None  # auto: Ray's cluster, or a new one; HOST:PORT: that one


def load_data(args):
    """The loader with its splits. Where the test split has no labels, as sst2's, the validation split is scored."""
    options = {"text_field": args.text_field, "label_names": args.words, "classify": True}
    data = CustomDataLoader(args.dataset, wanted=("train", "validation"), **options)
    try:
        data.splits |= CustomDataLoader(args.dataset, wanted=("test",), **options).splits
    except ValueError as e:
        print(f"note: the validation split is scored at the end ({e})")
    return data


def train(args, training) -> str:
    """One training. Returns its row of the table."""
    transformers.set_seed(training.seed)
    data = load_data(args)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # GPT-2 has none
    n_labels = len(data.label_names)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=n_labels)
    model.config.pad_token_id = tokenizer.pad_token_id
    if args.rank:
        attach_lora(model, args.targets, args.rank, args.alpha)
        mark_only_lora_as_trainable(model, also=args.trainable)
    print(parameter_report(model))

    def rows(split):
        texts = [ex.text for ex in data.splits[split]]
        tokens = tokenizer(texts, truncation=True, max_length=args.max_length)["input_ids"]
        return [{"input_ids": ids, "labels": ex.label} for ids, ex in zip(tokens, data.splits[split])]

    trainer = transformers.Trainer(
        model,
        training,
        train_dataset=rows("train"),
        eval_dataset=rows("validation"),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    scored = "test" if "test" in data.splits else "validation"
    accuracy = trainer.evaluate(rows(scored), metric_key_prefix="test")["test_accuracy"]
    if args.rank:
        save_adapter(model, training.output_dir, base_model=args.model, also=args.trainable)
    else:
        trainer.save_model()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    method = f"LoRA, r = {args.rank}" if args.rank else "every weight"
    return f"| {method} | {trained:,} | {scored} | {100 * accuracy:.2f} % |"


def main():
    parser = transformers.HfArgumentParser((Args, transformers.TrainingArguments))
    parser.set_defaults(output_dir="out-hf", learning_rate=1e-3, per_device_train_batch_size=32, report_to="none")
    parser.set_defaults(eval_strategy="epoch", save_strategy="no", logging_steps=50)
    args, training = parser.parse_args_into_dataclasses()
    jobs = [(args, training)]
    if args.also_full:
        full = replace(training, output_dir=f"{training.output_dir}-full", learning_rate=args.full_lr)
        jobs.append((replace(args, rank=0), full))
    with one_line_errors():
        if args.ray:
            import ray

            # Each machine has this repository at the same place.
            address = None if args.ray == "auto" else args.ray
            ray.init(address, runtime_env={"env_vars": {"PYTHONPATH": ROOT}})
            table = ray.get([ray.remote(train).remote(*job) for job in jobs])
        else:
            table = [train(*job) for job in jobs]
    print("", "| trained | parameters | split | accuracy |", "| --- | --- | --- | --- |", *table, sep="\n")
    print(f"saved: {', '.join(job[1].output_dir for job in jobs)}")


if __name__ == "__main__":
    main()
