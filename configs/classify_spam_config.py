# LoRA on every linear layer of a GPT-2 whose head is replaced by a classifier, on SMS spam.
# The data: SMS Spam Collection (Almeida and Hidalgo 2011), from the hub or a file with the columns label and text.
task = "classify"
init_from = "gpt2-mini"
out_dir = "out-spam"
dataset = "ucirvine/sms_spam"
text_field = "sms"
label_names = None  # as the data names them
template = "Review: {text}\nSentiment: {label}"  # not used: a classifier reads the text alone
lora_targets = r"\.(c_attn|c_proj|c_fc)$"
rank = 16
alpha = 16.0
dropout = 0.0
balance_classes = True  # one message in seven is spam
lr = 1e-3
batch_size = 32
max_iters = 420  # three epochs
warmup_iters = 20
eval_interval = 70
eval_iters = 0  # the whole validation split
