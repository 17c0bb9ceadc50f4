# A classification head on GPT-2, LoRA and biases in the last two attention layers, on SST-2 (Socher et al. 2013):
# 12,288 parameters are trained. --rank=0 --trainable='h\.1[01]\.attn\.c_attn' trains those layers themselves.
task = "classify"
init_from = "gpt2"
out_dir = "out-sst2"
dataset = "sst2"
text_field = "sentence"
label_names = None  # as the data names them
template = "Review: {text}\nSentiment: {label}"  # not used: a classifier reads the text alone
held_out = 0.2  # this part of the training split picks the best weights, so that
split = "validation"  # its validation split can score them: its test split has no labels
lora_targets = r"h\.1[01]\.attn\.c_attn$"
lora_bias = "lora_only"
rank = 1
alpha = 4.0
dropout = 0.0
lr = 1e-3
batch_size = 32
max_iters = 4000  # 2.4 epochs of the part that trains
warmup_iters = 200
eval_interval = 400
eval_iters = 0  # the whole validation split
