# What each stage runs, for the launchers beside this file, which source it. Every variable may be set in the environment.
#
# tokenizer -> codes (once for each source of stage two) -> warmup -> pretrain -> sft. A stage reads what the one before
# wrote below runs/ and data/; all hosts must see the same files. Given again, a training stage goes on from its newest
# complete checkpoint.

PAIRS=${PAIRS:-data/pairs}                            # shards of images with captions
LPIPS=${LPIPS:-models/lpips_with_vgg.pth}             # weights of others, for stage one's losses
DINO=${DINO:-models/dinov2_vits14_pretrain.pth}
TOKENIZER=${TOKENIZER:-runs/tokenizer_vitamin_l/export}
SHARDS=${SHARDS:-$PAIRS}                              # what the stage `codes` encodes, and where to
CODES=${CODES:-data/codes_pairs}
MODEL=${MODEL:-llama2_7b}                             # configs/mllm/MODEL_{warmup,pretrain,sft}.yaml

RESUME_ME=75 # exit code of a run that a signal stopped, after it saved a checkpoint

# Sets COMMAND, what every rank runs: a script, or -m and a module. Ranks of `codes` share the input's shards without talking
# to each other; started again, on any number of them, they make what is missing.
stage_command() {
    case "${1:-}" in
        tokenizer)
            COMMAND=(scripts/train_tokenizer.py --config configs/tokenizer/vitamin_l.yaml "data.source=$PAIRS"
                "loss.lpips_weights=$LPIPS" "discriminator.dino_weights=$DINO")
            ;;
        codes) COMMAND=(-m unitok data codes --tokenizer "$TOKENIZER" --shards "$SHARDS" --out "$CODES") ;;
        warmup) COMMAND=(scripts/train_mllm.py --config "configs/mllm/${MODEL}_warmup.yaml" "tokenizer=$TOKENIZER") ;;
        pretrain | sft) COMMAND=(scripts/train_mllm.py --config "configs/mllm/${MODEL}_$1.yaml") ;;
        *)
            echo "stage '${1:-}': expected tokenizer, codes, warmup, pretrain or sft" >&2
            exit 2
            ;;
    esac
}
