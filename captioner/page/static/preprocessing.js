/**
 * From an image to the pixels that the CNN sees: captioner/data/preprocessing.py in JavaScript.
 *
 * Scaling is Pillow's (13.0), whole number by whole number, so that the same image gives the same
 * pixels: along the rows and along the columns, each time with weights in fixed point and a result
 * of 8 bits.
 *
 * An image is what tells its `width` and `height` and has `read(top, rows)`, which returns some
 * rows as red, green, blue and a fourth byte, which counts for nothing, a pixel.
 */

const PRECISION_BITS = 22; // of the weights, behind the point
const STRIP_PIXELS = 1 << 18; // read at a time
const LONGEST_STRIP = 8; // a longer one is cut before it is scaled

// How far each filter reaches, and what it gives at a distance from its middle.
const FILTERS = {
  bilinear: { reach: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { reach: 2, weight: cubic },
};

/** Keys' cubic convolution with a = -0.5. */
function cubic(distance) {
  const x = Math.abs(distance),
    a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** Decode an image file, turned upright, its colours as they are in the file. */
export function decode(file) {
  return createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
}

/** Return an ImageBitmap as an image whose rows can be read, transparency being white. */
export function readable(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, 1);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  return {
    width: bitmap.width,
    height: bitmap.height,
    read(top, rows) {
      canvas.height = rows; // which empties it
      context.fillStyle = "white";
      context.fillRect(0, 0, bitmap.width, rows);
      context.drawImage(bitmap, 0, -top);
      return context.getImageData(0, 0, bitmap.width, rows).data;
    },
  };
}

/**
 * Return what the CNN sees of an image: (3, S, S), a Uint8Array.
 *
 * @param image - Of any size.
 * @param preprocessing - As export.json holds it.
 */
export function toPixels(image, preprocessing) {
  const { resize, image_size: size, resize_size: resized, interpolation } = preprocessing;
  if (resize === "squash") return planes(scale(image, size, size, interpolation));
  const cut = withoutEnds(image),
    short = Math.min(cut.width, cut.height);
  const [width, height] = [cut.width, cut.height].map((side) =>
    Math.floor((resized * side) / short),
  );
  return planes(centre(scale(cut, width, height, interpolation), size, size));
}

/** Return an image at another size. */
export function scale(image, width, height, interpolation) {
  const across = (each) => scaleRows(each, width, interpolation);
  const down = (each) => scaleColumns(each, height, interpolation);
  // What shrinks much more along its columns is shrunk there first, as in Pillow since 13.0.
  const isTall = image.height - height > Math.max(0, 2 * (image.width - width));
  return isTall ? across(down(image)) : down(across(image));
}

/** Return an image at another width. */
function scaleRows(image, width, interpolation) {
  if (width === image.width) return image;
  const { starts, counts, weights, most } = filter(image.width, width, interpolation);
  const result = new Uint8Array(4 * width * image.height);
  const rows = Math.max(1, Math.floor(STRIP_PIXELS / image.width));
  for (let top = 0, to = 0; top < image.height; top += rows) {
    const height = Math.min(rows, image.height - top),
      strip = image.read(top, height);
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < width; column++, to += 4) {
        let red = HALF,
          green = HALF,
          blue = HALF;
        let from = 4 * (row * image.width + starts[column]);
        const first = most * column,
          end = first + counts[column];
        for (let place = first; place < end; place++, from += 4) {
          const weight = weights[place];
          red += weight * strip[from];
          green += weight * strip[from + 1];
          blue += weight * strip[from + 2];
        }
        result[to] = toByte(red);
        result[to + 1] = toByte(green);
        result[to + 2] = toByte(blue);
      }
    }
  }
  return stored(result, width, image.height);
}

/** Return an image at another height. */
function scaleColumns(image, height, interpolation) {
  if (height === image.height) return image;
  const { starts, counts, weights, most } = filter(image.height, height, interpolation);
  const stride = 4 * image.width,
    result = new Uint8Array(stride * height);
  const sums = new Float64Array(stride);
  for (let row = 0; row < height; row++) {
    const strip = image.read(starts[row], counts[row]);
    sums.fill(HALF);
    for (let number = 0; number < counts[row]; number++) {
      const weight = weights[most * row + number],
        from = stride * number;
      for (let place = 0; place < stride; place++) sums[place] += weight * strip[from + place];
    }
    for (let place = 0; place < stride; place++) result[stride * row + place] = toByte(sums[place]);
  }
  return stored(result, image.width, height);
}

/** Return the image whose bytes these are. */
function stored(bytes, width, height) {
  return {
    width,
    height,
    read: (top, rows) => bytes.subarray(4 * width * top, 4 * width * (top + rows)),
  };
}

const HALF = 2 ** (PRECISION_BITS - 1); // so that what is cut off rounds

function toByte(sum) {
  return Math.min(255, Math.max(0, sum >> PRECISION_BITS));
}

/** Return for each place of a scaled line which places it is made of, and their weights. */
function filter(before, after, interpolation) {
  const { reach, weight } = FILTERS[interpolation];
  const scale = before / after,
    stretch = Math.max(scale, 1),
    support = reach * stretch;
  const most = 2 * Math.ceil(support) + 1;
  const starts = new Int32Array(after),
    counts = new Int32Array(after);
  const weights = new Int32Array(after * most);
  for (let place = 0; place < after; place++) {
    const middle = (place + 0.5) * scale;
    const start = Math.max(0, Math.trunc(middle - support + 0.5));
    const end = Math.min(before, Math.trunc(middle + support + 0.5));
    const exact = [];
    for (let from = start; from < end; from++) {
      exact.push(weight((from - middle + 0.5) * (1 / stretch)));
    }
    const sum = exact.reduce((total, each) => total + each, 0);
    exact.forEach((each, number) => {
      const fixed = (each / sum) * 2 ** PRECISION_BITS;
      weights[most * place + number] = Math.trunc(fixed + (fixed < 0 ? -0.5 : 0.5));
    });
    starts[place] = start;
    counts[place] = exact.length;
  }
  return { starts, counts, weights, most };
}

/** Return a long strip without its ends. */
function withoutEnds(image) {
  const longest = LONGEST_STRIP * Math.min(image.width, image.height);
  return centre(image, Math.min(image.width, longest), Math.min(image.height, longest));
}

/** Return the middle of an image. */
function centre(image, width, height) {
  const left = middle(image.width, width),
    above = middle(image.height, height);
  if (width === image.width)
    return { width, height, read: (top, rows) => image.read(above + top, rows) };
  return {
    width,
    height,
    read(top, rows) {
      const whole = image.read(above + top, rows),
        part = new Uint8Array(4 * width * rows);
      for (let row = 0; row < rows; row++) {
        const from = 4 * (row * image.width + left);
        part.set(whole.subarray(from, from + 4 * width), 4 * width * row);
      }
      return part;
    },
  };
}

/** Return where the middle part of a line begins; a half is rounded to the even number. */
function middle(whole, part) {
  const half = (whole - part) / 2,
    below = Math.floor(half);
  return half - below === 0.5 ? below + (below % 2) : Math.round(half);
}

/** Return red, green and blue as planes, one after the other. */
function planes(image) {
  const count = image.width * image.height,
    bytes = image.read(0, image.height);
  const result = new Uint8Array(3 * count);
  for (let place = 0; place < count; place++) {
    for (let colour = 0; colour < 3; colour++) {
      result[colour * count + place] = bytes[4 * place + colour];
    }
  }
  return result;
}
