#!/bin/sh
# The command line of the published FluxFlow trainer, as it is: train an autoencoder, then the flow on its latents.
#
#   DATA_PATH=data/images CAPTIONS_FILE=data/captions.txt sh docs/fluxflow_example.sh
#   sh docs/fluxflow_example.sh --validate-pipeline        # options are passed on: here, only the plan of the first command
#
# Run it again to continue. docs/fluxflow.md says what is different.
set -e

DATA_PATH="${DATA_PATH:-data/images}"
CAPTIONS_FILE="${CAPTIONS_FILE:-data/captions.txt}"   # a file name, a tab and a caption in each line
OUTPUT_PATH="${OUTPUT_PATH:-data/output/fluxflow_example}"

VAE_DIM=128            # channels of the latents
FEAT_DIM=128           # width of the flow processor
FEAT_DIM_DISC=8        # width of the discriminator
EPOCHS=50
BATCH_SIZE=2
LR=1e-5
LR_MIN=0.1             # end of the cosine, as a share of the rate
WORKERS=8

fluxflow-train \
  --data_path "$DATA_PATH" \
  --captions_file "$CAPTIONS_FILE" \
  --output_path "$OUTPUT_PATH/vae" \
  --train_vae \
  --train_spade \
  --gan_training \
  --n_epochs $EPOCHS \
  --batch_size $BATCH_SIZE \
  --lr $LR \
  --lr_min $LR_MIN \
  --vae_dim $VAE_DIM \
  --feature_maps_dim $FEAT_DIM \
  --feature_maps_dim_disc $FEAT_DIM_DISC \
  --workers $WORKERS \
  --generate_diagrams \
  --use_fp16 "$@"

test -z "$*" || exit 0

fluxflow-train \
  --data_path "$DATA_PATH" \
  --captions_file "$CAPTIONS_FILE" \
  --output_path "$OUTPUT_PATH/flow" \
  --model_checkpoint "$OUTPUT_PATH/vae/flxflow_final.safetensors" \
  --train_diff \
  --n_epochs $EPOCHS \
  --batch_size $BATCH_SIZE \
  --lr 5e-7 \
  --sample_captions "a photo of a cat sitting on a couch" \
  --workers $WORKERS \
  --generate_diagrams \
  --use_fp16
