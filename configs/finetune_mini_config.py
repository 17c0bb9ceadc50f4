# What `make demo` runs: the shipped base model on reviews from the package index. No GPU, no hub.
init_from = "gpt2-mini"
out_dir = "out-mini"
dataset = "rt_reviews"
# Words that reviewers do write after such a sentence start training further on than "negative" and "positive" would
# (Schick and Schuetze 2021, "Exploiting Cloze Questions", section 3.1, call them verbalizers).
template = "{text} This movie is {label}"
label_names = "terrible,great"
rank = 16
alpha = 64.0
dropout = 0.0
lora_targets = "c_(attn|proj|fc)$"  # every linear layer
lr = 1e-3
batch_size = 32
max_iters = 640  # two epochs
warmup_iters = 20
eval_interval = 80
eval_iters = 0  # the whole validation split
