# What `make demo` runs: the shipped base model on reviews from the package index. No GPU, no hub.
init_from = "gpt2-mini"
out_dir = "out-mini"
dataset = "rt_reviews"
template = "{text}\n\nThis review is {label}"
rank = 16
alpha = 64.0
lr = 2e-3
batch_size = 32
max_iters = 640  # two epochs
warmup_iters = 20
eval_interval = 80
