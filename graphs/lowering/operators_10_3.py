"""The operators of TensorRT 10.3's ONNX parser (JetPack 6), and the restrictions that our graphs could meet.

Source: onnx/onnx-tensorrt, docs/operators.md at 73f629e (branch 10.1-GA), the last public table before 10.3; its
Changelog.md says that 10.2 and 10.3 took no operator away (10.3 lets the axes of Slice be a tensor). Opsets 9 to 20.
"""

OPSET = 20

OPERATORS = frozenset(
    """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil
Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace
DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements
GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
GroupNormalization HardSigmoid HardSwish Hardmax Identity If ImageScaler InstanceNormalization IsInf IsNaN LRN
LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max
MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad
ParametricSoftplus Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range
Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round ScaledTanh Scan Scatter ScatterElements
ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt
Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
""".split()
)

# Operator → which input has to be known when the file is parsed: an initialiser or a Constant.
CONSTANT_INPUT = {
    **dict.fromkeys(sorted(name for name in OPERATORS if name.startswith("Reduce")), 1),
    "CumSum": 1,
    "OneHot": 1,
    "Pad": 3,
    "Squeeze": 1,
    "Unsqueeze": 1,
}
