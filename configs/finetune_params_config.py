# The assignment's run: python train.py configs/finetune_params_config.py --rank=16
# gpt2-medium on Rotten Tomatoes, instruction fine-tuning with LoRA on QKV and output projections.
# These are the defaults of configurator.py, written out to be changed here.
init_from = "gpt2-medium"
out_dir = "out"
dataset = "rotten_tomatoes"
label_names = "negative,positive"
template = """Classify the sentiment of the following movie review as positive or negative.

Review: {text}

Sentiment: {label}"""
rank = 128
alpha = 512.0  # alpha / rank = 4
dropout = 0.05
lr = 5e-4
batch_size = 32
gradient_accumulation_steps = 1
max_iters = 320
warmup_iters = 20
eval_interval = 40
eval_iters = 20
