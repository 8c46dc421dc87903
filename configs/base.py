"""Every key of the program, its default and its meaning; the only home of a default.

An experiment file calls `get_config()` of this file, edits what differs, and says in
its header what it is for. `--config=FILE:smoke` shrinks any experiment to seconds.
"""

from ml_collections import ConfigDict

from configs.smoke import shrink


def get_config(variant: str = "") -> ConfigDict:
    """Returns the complete configuration with its defaults."""
    c = ConfigDict()
    c.name = "base"  # shown in the report
    c.seed = 0  # every random number is a function of it

    c.model = ConfigDict()
    c.model.name = "emoji"  # the pipeline: "emoji" | "stable_diffusion" (1.x and 2.x)
    # | "video_dit" (no weights exist: it is planned, or random and small)
    c.model.init = "assets"  # "assets" (shipped weights). emoji: also "random", or the
    # path of an .npz written by --mode=export. stable_diffusion: a diffusers folder or
    # "owner/name" on the hub; its assets are a tiny random one for ":smoke"
    c.model.revision = "main"  # hub: branch, tag or commit
    c.model.variant = ""  # of the weight files: "" | "fp16" | ...
    c.model.vae_dtype = "float32"  # of the autoencoder
    c.model.vae_at_once = 1  # pictures a device decodes at a time
    # width, depth, heads and patch are those of the emoji and the video network
    c.model.width = 192  # channels of the transformer
    c.model.depth = 6  # blocks
    c.model.heads = 6  # attention heads; an .npz of --mode=export says its own
    c.model.patch = 4  # pixels a token is wide
    c.model.image_size = 32  # pixels; stable_diffusion: 0 is what the UNet is made for
    c.model.dtype = "float32"  # of the network; "float32" | "bfloat16": states,
    # log-probs and losses are float32 with either
    # of products of a float32 network on accelerators: "highest" (float32) | "high" |
    # "default" (TF32 on NVIDIA GPUs, bfloat16 on TPUs: several times faster)
    c.model.matmul_precision = "highest"
    c.model.attention = "auto"  # by backend, dtype, lengths and mesh one of "xla",
    # "chunked" (memory of 1,024 queries at a time), "cudnn" (NVIDIA), "splash" (TPU),
    # and where mesh.context > 1 "ulysses" (if it divides the heads) or "ring", which
    # are of self-attention: that to a prompt is then as by "auto"
    c.model.remat = "none"  # what a block keeps for its gradient: "none" (everything;
    # the policy term still computes its forward pass twice) | "full" (its input only) |
    # "dots" (products with weights) | "named" (the outputs of its layers) | "offload"
    # (those, in the memory of the host)

    c.model.video = ConfigDict()  # video_dit
    c.model.video.frames = 21  # of latents
    c.model.video.height = 60  # latents
    c.model.video.width = 104  # latents
    c.model.video.channels = 16  # of a latent
    c.model.video.mlp = 13824  # hidden width of the feed-forward layers
    c.model.video.text_tokens = 512  # of a prompt
    c.model.video.text_width = 4096  # of the text encoder's states

    c.lora = ConfigDict()
    c.lora.rank = 0  # 0: all weights are trained
    c.lora.alpha = 0.0  # 0: alpha = rank (scale 1)
    # of the frozen weights: "compute" (model.dtype; those used in float32 stay float32,
    # so every number stays what it was) | "float32"
    c.lora.base_dtype = "compute"

    c.data = ConfigDict()
    c.data.source = "emoji"  # "emoji" (shipped, of the emoji model), "samples"
    # (data.path written by --mode=sample), "none" (where data_term.weight is 0 and
    # prompts.source is not "data"), and for stable_diffusion "folder" (captioned
    # pictures) or "tfds" (a prepared data set)
    c.data.path = ""  # of the samples, the folder, or the data set (or its name)
    c.data.split = "train"  # tfds
    c.data.image_feature = "image"  # tfds
    c.data.caption_feature = "caption"  # tfds; "a/b" for one within a feature
    c.data.tfds_dir = ""  # tfds: where prepared sets lie; "" is TFDS's own place
    c.data.resample = "bicubic"  # "bicubic" | "lanczos": to the model's size
    c.data.on_bad = "error"  # "error" | "skip": pictures or captions that are no use
    c.data.cache = "~/.cache/ddrl_jax"  # folder of caches of latents and embeddings
    c.data.cache_dtype = "float16"  # of the latents on disk, or "float32"
    c.data.cache_text_dtype = "float32"  # of the embeddings, or "float16"
    c.data.cache_batch = 8  # pictures or captions an encoder call while it is written
    c.data.min_scale = 0.5  # emoji: smallest size as a share of the picture
    c.data.max_scale = 1.0  # emoji: largest
    c.data.rotation = 15.0  # emoji: degrees either way
    c.data.heldout = 0  # records at the end that only the held-out data loss sees, for
    # data_term.captions "own"; "prompt" holds out augmentations and noise instead

    c.prompts = ConfigDict()
    c.prompts.source = "data"  # "data" (captions of the data) | "file" | "list" | "set"
    # | "questions" | "tfds"
    c.prompts.path = ""  # "file": text file, one prompt a line; "questions": JSON lines
    # of prompts with questions; "tfds": folder or name of a prepared data set
    c.prompts.set = ""  # "set": imagenet_all | imagenet_animals | imagenet_dogs |
    # simple_animals | nouns_activities | counting | vqa_v0 | vqa_v1 | vqa_v2
    c.prompts.feature = "caption"  # "tfds": its text feature
    c.prompts.split = "train"  # "tfds": its split
    c.prompts.list = ()  # the prompts themselves, for "list"
    c.prompts.limit = 0  # keep a seeded choice of so many; 0 keeps all. Every device
    # holds the embeddings of all that are kept (236 KB each of Stable Diffusion): more
    # than 4 GB are refused
    c.prompts.per_epoch = 8  # prompts drawn each epoch
    c.prompts.group_size = 8  # samples of each

    c.sampler = ConfigDict()
    c.sampler.kernel = "flow_grpo"  # ddim | flow_grpo | dance | cps | edm
    c.sampler.steps = 10
    c.sampler.noise_level = 0.7  # flow_grpo and cps
    c.sampler.eta = 1.0  # ddim and dance
    c.sampler.churn = 1.0  # edm: S_churn
    c.sampler.sigma_max = 80.0  # edm
    c.sampler.sigma_min = 0.01  # edm
    c.sampler.shift = 1.0  # flow: time shift of the grid
    c.sampler.last_step = "deterministic"  # or "stochastic"; flow_grpo and dance
    c.sampler.window = ()  # (first, stop): the steps that have noise, the others are
    # the ODE's (MixGRPO); flow_grpo, dance and cps. (): all that can
    c.sampler.guidance_scale = 1.0  # 1: no guidance, the same in rollout and training

    c.rewards = ConfigDict()
    c.rewards.weights = ConfigDict({"compressibility": 1.0})  # name -> weight
    c.rewards.heldout = ("retrieval",)  # judged at evaluation, never trained on
    c.rewards.jpeg_upscale = 4  # nearest upscaling before JPEG (1 for real pictures)
    c.rewards.threads = 2
    c.rewards.timeout = 120.0  # seconds a batch may take
    c.rewards.on_failure = "error"  # "error" | "mask" (the sample leaves its group; so
    # does one that is NaN)

    # Folders or hub repositories, for aesthetic, clip_score, pickscore and hpsv2; two
    # are single files, by path or as owner/name:file of the hub. "assets" is a tiny
    # random one for :smoke (there is none of hpsv2).
    c.rewards.clip = "openai/clip-vit-large-patch14"
    c.rewards.clip_h = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    c.rewards.aesthetic_head = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"
    c.rewards.pickscore = "yuvalkirstain/PickScore_v1"
    c.rewards.hpsv2 = "xswu/HPSv2:HPS_v2.1_compressed.pt"
    c.rewards.vlm = ConfigDict()  # vlm_alignment and vlm_questions
    c.rewards.vlm.base_url = ""  # of an OpenAI-compatible server, ending in /v1
    c.rewards.vlm.model = ""  # its name there
    c.rewards.vlm.api_key_env = ""  # environment variable with the key; "": none
    c.rewards.vlm.timeout = 60.0  # seconds a question may take
    c.rewards.vlm.retries = 5  # of 429, 5xx, timeouts and lost connections
    c.rewards.vlm.backoff = 1.0  # seconds before the first of them, then doubled
    c.rewards.vlm.threads = 8  # questions at a time
    c.rewards.vlm.max_tokens = 64  # of an answer
    c.rewards.vlm.body = ""  # more fields of a request, a JSON object; null drops one
    c.rewards.vlm.scorer = "bertscore"  # vlm_alignment: "bertscore" | "words" (share of
    # the prompt's words in the answer, needs no model)
    c.rewards.vlm.bertscore_model = "microsoft/deberta-xlarge-mnli"
    c.rewards.vlm.bertscore_layers = 0  # 0: bert-score's own choice for the model
    c.rewards.vlm.bertscore_device = "cpu"  # as PyTorch calls it: "cpu" | "cuda:1" |
    # ...; JAX holds the memory of the devices that it sees
    c.rewards.vlm.questions = "counting"  # vlm_questions: a set, or a JSON lines file
    c.rewards.vlm.match = "substring"  # "substring" (as DDPO) | "word"

    c.advantages = ConfigDict()
    c.advantages.kind = "group"  # "group" | "tracker" (running, per prompt) | "batch"
    c.advantages.std = "group"  # group: divide by "group" or "global" std or "none"
    c.advantages.epsilon = 1e-4  # added to the std
    c.advantages.clip = 5.0  # |advantage| at most; 0: no clip
    c.advantages.tracker_size = 16  # rewards kept a prompt
    c.advantages.tracker_min = 16  # below this many the batch statistics are used

    c.policy = ConfigDict()
    c.policy.weight = 1.0  # 0: no rollout, no policy term (pre-training)
    c.policy.term = "clipped"  # "clipped" | "reinforce" | "rwr" | "sparse_rwr": the
    # last two fit the epoch's own samples by weighted denoising loss; their weights are
    # those of the whole epoch, or with advantages.kind "group" of each prompt
    c.policy.rwr_inverse_temperature = 0.2  # multiplies the reward in the softmax
    c.policy.rwr_percentile = 0.9  # sparse_rwr: the share of samples that is dropped
    c.policy.clip_range = 1e-4
    c.policy.log_prob = "gaussian"  # "gaussian" | "squared_error" (no 1 / (2 std^2))
    c.policy.reduction = "mean"  # over the latent axes: "mean" | "sum"
    c.policy.transform = "linear"  # "linear" | "neg_exp" | "neg_exp_centered"
    c.policy.beta = 1.0  # advantages are divided by it (DDRL's temperature)
    c.policy.old_log_prob = "rollout"  # "rollout" | "recompute" | "exact" (one update
    # an epoch). policy/rollout_gap is the largest distance of the last two to the
    # rollout's
    c.policy.kl_weight = 0.0  # step KL to the starting policy, reduced as log-probs are
    c.policy.train_on = ()  # step indices trained; () means draw train_steps of them
    c.policy.train_steps = 3  # steps drawn each epoch when train_on is (); 0: all noisy
    c.policy.per_sample_steps = False  # draw them for each sample on its own (DDPO)
    c.policy.ratio_tolerance = 0.0  # largest |ratio - 1| before an epoch's first
    # update: above it the run does not begin, or stops after that epoch's updates

    c.data_term = ConfigDict()
    c.data_term.weight = 0.0  # 0: no data loss
    c.data_term.weighting = "velocity"  # "velocity" | "edm" | "eps"
    c.data_term.levels = "own"  # noise levels: "own" draw | "rollout" (its levels and
    # its initial noise)
    c.data_term.every_step = False  # at every trained step, or once a sample: with
    # levels "rollout" that is the first trained step, the noisiest one, only
    c.data_term.time = "uniform"  # own draw: "uniform" | "logit_normal"
    c.data_term.text_dropout = 0.1
    c.data_term.captions = "prompt"  # "prompt": data of the caption that was rolled
    # out; "own": any record of the data under its own caption

    c.train = ConfigDict()
    c.train.epochs = 30
    c.train.minibatches = 2  # optimizer steps a pass over the epoch's samples
    c.train.microbatch = 16  # samples of one device in a network call, at most: a mesh
    # with so many devices that a minibatch has fewer for each takes those
    c.train.inner_epochs = 1  # passes over the epoch's samples
    c.train.nan_limit = 3  # updates in a row with non-finite gradients before stopping

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # "adamw" | "muon" (matrices of the blocks of emoji and
    # video_dit, the rest by AdamW with Nesterov's momentum; all weights, in float32)
    c.optimizer.lr = 1e-4
    c.optimizer.master = "float32"  # dtype of what is trained: "float32" | "bfloat16"
    c.optimizer.state_dtype = "float32"  # of both moments: "float32" | "bfloat16";
    # bfloat16 is rounded up or down at random, so that small steps count on average
    c.optimizer.warmup = 0  # optimizer steps
    c.optimizer.schedule = "constant"  # "constant" | "cosine" (to 0 at the last step)
    c.optimizer.b1 = 0.9  # muon: its momentum too
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.grad_clip = 1.0  # global norm; 0: none
    c.optimizer.fresh = False  # new moments and warm-up each epoch (rounds of RWR)
    c.optimizer.ema_decay = 0.9  # 0: no average, evaluation uses the weights themselves

    c.evaluate = ConfigDict()
    c.evaluate.every = 5  # epochs; 0: only before the first and at the end
    c.evaluate.samples = 64  # one a prompt, prompts repeated in order
    c.evaluate.steps = 10  # deterministic ODE steps
    c.evaluate.solver = "euler"  # "euler" | "heun" (flow ODE), "ddim"
    # (eta 0, for any network), or "rollout": the sampler of training, with its noise,
    # steps and guidance in place of those here
    c.evaluate.guidance_scale = 1.0
    c.evaluate.data_samples = 64  # held-out data loss: of emoji drawn anew, of the
    # records of data.heldout, or where that is 0 of those trained on with other noise
    c.evaluate.pictures = 16  # of them in the grid

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 1  # epochs; a kill without notice costs those since the last
    c.checkpoint.wait = True  # until a save is on disk; False: it is written while the
    # next epoch runs, and a kill meanwhile costs what came since the one before
    c.checkpoint.keep = 2
    c.checkpoint.resume = "latest"  # "latest" | "last_good" (skip a damaged one)

    c.sample = ConfigDict()  # --mode=sample; prompts.* need not be those of the run,
    # and where they are not the captions of its data, these need not be there
    c.sample.per_prompt = 8
    c.sample.solver = "auto"  # deterministic: "euler" | "heun" (flow ODE), "ddim" (eta
    # 0, for any network), "auto": ddim for stable_diffusion, else euler
    c.sample.guidance_scale = 2.0
    c.sample.steps = 20  # of the solver
    c.sample.output = ""  # folder of the data set; "" means WORKDIR/dataset

    c.export = ConfigDict()  # --mode=export of stable_diffusion
    c.export.merge_lora = False  # a LoRA run: the whole pipeline instead of a LoRA file
    c.export.bake_alpha = True  # alpha / rank is multiplied into B; False: it stands in
    # the header of the file, which diffusers 0.33 and other programs do not read
    c.export.dtype = "float32"  # of a whole UNet: "float32" | "float16" | "bfloat16"

    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "context": 1})

    c.sharding = ConfigDict()  # logical axis of a weight -> mesh axes it is split over;
    # one that does not divide is left out and named at the start. The batch is always
    # split over data and fsdp, the length of a sequence over context.
    c.sharding.embed = ("fsdp",)  # width of the residual stream
    c.sharding.mlp = ("tensor",)  # inner width of a block
    c.sharding.heads = ("tensor",)  # attention heads
    c.sharding.vocab = ("tensor",)  # words
    c.sharding.layers = ()  # blocks that are scanned over

    c.rollout = ConfigDict()
    c.rollout.layout = "train"  # of the weights while sampling: "train" | "replicated"
    # | "tensor" (split over tensor only): one copy an epoch, for meshes with fsdp
    c.rollout.dtype = "float32"  # of that copy, at most: "float32" | "bfloat16"

    c.log = ConfigDict()
    c.log.tensorboard = True
    c.log.wandb = False
    c.log.progress = True
    c.log.peak_flops = 0.0  # FLOP/s of a device, for the MFU; 0: as the chip is known
    return shrink(c, variant)
