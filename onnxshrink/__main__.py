import sys

from onnxshrink import shrink

a=sys.argv
shrink(a[2], output=a[a.index('-o')+1])
