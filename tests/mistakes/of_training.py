"""Mistakes that other trainers shipped, or that comparing layouts under SGD alone doesn't see."""

from tests.mistakes.mistake import Mistake

LAYOUTS = "tests/parallel/test_layouts.py"
TRAJECTORY = f"{LAYOUTS}::test_loss_gradients_norm_and_sgd_trajectory_equal_one_rank"
EXCHANGED = (
    "tests/parallel/test_all_to_all_exchange.py::test_every_token_meets_its_experts_and_comes_back"
)
NORM = (
    "tests/parallel/test_exactness.py"
    "::test_the_norm_is_that_of_all_gradients_dense_and_expert_each_element_once"
)

MISTAKES = (
    Mistake(
        name="expert gradients × degree",
        file="moetrain/parallel/sharding.py",
        right="module.set_gradient_divide_factor(1.0)",
        wrong=(
            "module.set_gradient_divide_factor(1.0 / meshes.topology.expert "
            "if type(module).__name__.endswith('Experts') else 1.0)"
        ),
        test=TRAJECTORY,
        verify=True,
    ),
    Mistake(
        name="clip norm of the dense part only",
        file="moetrain/parallel/gradients.py",
        right="torch._foreach_norm(self._local())",
        wrong="torch._foreach_norm([g for g in self._local() if g.ndim < 3])",
        test=NORM,
        verify=True,
    ),
    Mistake(
        name="balance counts of the own rank",
        file="moetrain/train/objective.py",
        right="meshes.sum(routing.counts, over=TOKEN_AXES) if counts is None else counts",
        wrong="routing.counts if counts is None else counts",
        test=TRAJECTORY,
        verify=True,
    ),
    Mistake(
        name="z-loss over the own micro-batch",
        file="moetrain/train/objective.py",
        right="router.z_loss_weight * routing.z_sum.sum() / num_tokens",
        wrong="router.z_loss_weight * routing.z_sum.sum() / batch.valid.sum().clamp_min(1)",
        test=TRAJECTORY,
        verify=True,
    ),
    Mistake(
        name="off-by-one among local experts, sent once",
        file="moetrain/parallel/all_to_all_exchange.py",
        right="choices = here.masked_fill(elsewhere, self.local_experts)",
        wrong=(
            "choices = ((here + 1) % self.local_experts).masked_fill(elsewhere, self.local_experts)"
        ),
        test=EXCHANGED,
        verify=True,
    ),
    Mistake(
        name="off-by-one among local experts, sent each",
        file="moetrain/parallel/all_to_all_exchange.py",
        right="(experts.flatten()[sent.slot] % self.local_experts)",
        wrong="((experts.flatten()[sent.slot] + 1) % self.local_experts)",
        test=EXCHANGED,
        verify=True,
    ),
    Mistake(
        name="bias sign",
        file="moetrain/model/router.py",
        right="self.bias += rate *",
        wrong="self.bias -= rate *",
        test=(
            "tests/model/test_router.py"
            "::test_the_bias_evens_out_the_choice_and_stays_in_use_when_no_longer_updated"
        ),
        verify=True,
    ),
    Mistake(
        name="gates detached",
        file="moetrain/model/router.py",
        right="gates = self.gates(logits, scores, experts)",
        wrong="gates = self.gates(logits, scores, experts).detach()",
        test="tests/model/test_transformer.py::test_router_learns_from_the_main_loss_alone",
        verify=True,
    ),
    Mistake(
        name="jitter by rank",
        file="moetrain/train/micro_batch.py",
        right='random_stream(config.seed, "sample", sample) for sample in samples',
        wrong='random_stream(config.seed, "sample", sample - samples.start) for sample in samples',
        test=(
            "tests/train/test_runs.py"
            "::test_jitter_resumes_bit_for_bit_and_is_the_same_in_every_layout"
        ),
        verify=True,
    ),
    Mistake(
        name="experts without weight decay",
        file="moetrain/optim/optimizer.py",
        right='getattr(parameter, "device_mesh", None), role, parameter.ndim > 1)',
        wrong='getattr(parameter, "device_mesh", None), role, parameter.ndim == 2)',
        test="tests/optim/test_optim.py::test_adamw_equals_the_formula_over_three_steps",
        verify=True,
    ),
    Mistake(
        name="mean instead of sum",
        file="moetrain/parallel/sharding.py",
        right="module.set_gradient_divide_factor(1.0)",
        wrong="module.set_gradient_divide_factor(float(meshes.dense.size()))",
        test=TRAJECTORY,
        verify=True,
    ),
    Mistake(
        name="positions not restarted at documents",
        file="moetrain/model/documents.py",
        right="torch.arange(starts.numel()) - firsts.repeat_interleave(lengths)",
        wrong="torch.arange(starts.shape[1]).repeat(len(starts))",
        test="tests/model/test_documents.py::test_rotary_positions_begin_anew_at_each_document",
        verify=True,
    ),
    Mistake(
        name="Adam's step not restored on resume",
        file="moetrain/train/state.py",
        right="if isinstance(value, Tensor):",
        wrong='if isinstance(value, Tensor) and key != "step":',
        test=(
            "tests/train/test_resume.py"
            "::test_a_checkpoint_that_forgets_nothing_keeps_the_curve_bit_for_bit"
        ),
    ),
    Mistake(
        name="norm over replicas twice",
        file="moetrain/train/step.py",
        right="(gradients.square_sum(), WEIGHT_AXES)",
        wrong="(gradients.square_sum(), (*WEIGHT_AXES, 'data_replicate'))",
        test=TRAJECTORY,
        verify=True,
    ),
    Mistake(
        name="no counts ahead",
        file="moetrain/train/objective.py",
        right='router.load_balance_scope != "global_batch" or len(batches) == 1:',
        wrong='router.load_balance_scope != "global_batch" or batches:',
        test=TRAJECTORY,
        verify=True,
    ),
    Mistake(
        name="bias moved on a skipped step",
        file="moetrain/train/step.py",
        right="""
        optimizer.step()
        _update_router_biases(model, report.expert_counts)
""",
        wrong="""
        optimizer.step()
    _update_router_biases(model, report.expert_counts)
""",
        test="tests/train/test_step.py::test_a_skipped_step_moves_nothing",
        verify=True,
    ),
    Mistake(
        name="gradients reduced in the compute dtype",
        file="moetrain/parallel/sharding.py",
        right="param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False",
        wrong="param_dtype=dtype, reduce_dtype=dtype, cast_forward_inputs=False",
        test="tests/parallel/test_parallelize.py::test_gradients_add_up_over_ranks_in_float32",
        verify=True,
    ),
    Mistake(
        name="residual initialisation unscaled",
        file="moetrain/model/init.py",
        right="return std / math.sqrt(2 * added)",
        wrong="return std",
        test="tests/model/test_init.py::test_what_writes_into_the_residual_stream_starts_smaller",
        verify=True,
    ),
    Mistake(
        name="residual initialisation of the next layer",
        file="moetrain/model/init.py",
        right='int(name.split(".")[1]) + 1',
        wrong='int(name.split(".")[1]) + 2',
        test=("tests/model/test_init.py::test_the_residual_scale_is_by_depth_by_layer_or_none"),
    ),
    Mistake(
        name="soft cap left out of the backward pass",
        file="moetrain/model/losses.py",
        right="grad.mul_(tanh.square_().neg_().add_(1.0))",
        wrong="pass",
        verify=True,
        test=(
            "tests/model/test_transformer.py"
            "::test_soft_cap_and_z_loss_of_the_head_have_the_gradients_of_autograd_in_float64"
        ),
    ),
    Mistake(
        name="z-loss of the head without a gradient",
        file="moetrain/model/losses.py",
        right="grad.mul_(1.0 + 2.0 * z_weight * normaliser)",
        wrong="pass",
        test=(
            "tests/model/test_transformer.py"
            "::test_soft_cap_and_z_loss_of_the_head_have_the_gradients_of_autograd_in_float64"
        ),
        verify=True,
    ),
    Mistake(
        name="z-loss of the head over padding too",
        file="moetrain/model/losses.py",
        right="torch.where(mask, normaliser.square(), 0.0)",
        wrong="normaliser.square()",
        test=(
            "tests/model/test_transformer.py"
            "::test_soft_cap_and_z_loss_of_the_head_have_the_gradients_of_autograd_in_float64"
        ),
        verify=True,
    ),
    Mistake(
        name="losses of the head by the micro-batch's tokens",
        file="moetrain/train/objective.py",
        right="output.token_loss / num_tokens",
        wrong="output.token_loss / batch.valid.sum().clamp_min(1)",
        test=f"{LAYOUTS}::test_what_is_logged_of_router_and_head_is_what_is_minimised",
        verify=True,
    ),
    Mistake(
        name="padding counted in validation",
        file="moetrain/train/validation.py",
        right="batch.valid.sum().double()",
        wrong="torch.ones_like(batch.valid).sum().double()",
        test="tests/train/test_validation.py::test_padding_counts_in_no_validation_loss",
    ),
    Mistake(
        name="recomputation routes again",
        file="moetrain/model/choice.py",
        right="if self._experts is None:",
        wrong="if True:",
        test="tests/parallel/test_parallelize.py::test_recomputation_never_routes_again",
        verify=True,
    ),
    Mistake(
        name="betas swapped",
        file="moetrain/optim/optimizer.py",
        right="betas=settings.betas",
        wrong="betas=settings.betas[::-1]",
        test="tests/optim/test_optim.py::test_adamw_equals_the_formula_over_three_steps",
        verify=True,
    ),
)
