# The assignment's run: python train.py configs/finetune_params_config.py --rank=16 --alpha=64
# gpt2-medium on Rotten Tomatoes, instruction fine-tuning with LoRA on QKV and output projections.
init_from = "gpt2-medium"
out_dir = "out-medium"
dataset = "rotten_tomatoes"
label_names = "negative,positive"
template = """Classify the sentiment of the following movie review as positive or negative.

Review: {text}

Sentiment: {label}"""
rank = 128
alpha = 512.0  # alpha / rank = 4
dropout = 0.05
lr = 5e-4
batch_size = 8
gradient_accumulation_steps = 4
max_iters = 100
warmup_iters = 10
eval_interval = 20
eval_iters = 20
wandb_project = "nanolora-rotten-tomatoes"
