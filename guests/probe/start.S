/* Entry, hypercalls in both ABIs, and the way of an AP from SIPI to C.
 *
 * Entered as Linux's 64-bit boot protocol says: long mode, identity map, interrupts off, RSI = boot_params.
 */
#include "../bare/entry.h"

#define MAX_VPS 64

    .section .text.entry, "ax"
    .code64
    .globl probe_entry
probe_entry:
    cli
    cld
    mov $vp_stacks + STACK_SIZE, %rsp
    mov %rsi, %rbx
    call load_segments
    mov %rbx, %rdi
    call probe_main
1:  hlt
    jmp 1b

load_segments:
    lgdt gdt_pointer
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    pop %rax
    push $CODE64
    push %rax
    lretq

    .text
/* u64 hypercall_32(u64 control, u64 input, u64 output): EDX:EAX, EBX:ECX, EDI:ESI; result in EDX:EAX. */
    .globl hypercall_32
hypercall_32:
    push %rbx
    push %rbp
    mov %rdi, %r8
    mov %rdx, %r9
    mov %rsi, %rbx
    mov %esi, %ecx
    shr $32, %rbx
    mov %r9d, %esi
    mov %r9, %rdi
    shr $32, %rdi
    mov %r8d, %eax
    mov %r8, %rdx
    shr $32, %rdx
    push $CODE32
    push $compatibility_mode
    lretq
    .code32
compatibility_mode:
    mov $hypercall_page, %ebp
    call *%ebp
    ljmp $CODE64, $long_mode_again
    .code64
long_mode_again:
    mov %eax, %eax
    shl $32, %rdx
    or %rdx, %rax
    pop %rbp
    pop %rbx
    ret

/* An AP starts here, in a page that smp.c copied this to. */
    ap_trampoline ap_protected_mode

    .code32
ap_protected_mode:
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov ap_cr4, %eax
    mov %eax, %cr4
    mov ap_cr3, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    mov ap_efer, %eax
    xor %edx, %edx
    wrmsr
    mov ap_cr0, %eax
    mov %eax, %cr0
    ljmp $CODE64, $ap_long_mode
    .code64
ap_long_mode:
    mov $1, %edi
    lock xadd %edi, ap_count
    inc %edi
    mov %edi, %eax
    cmp $MAX_VPS, %eax
    jae 1f
    inc %eax
    imul $STACK_SIZE, %eax, %eax
    lea vp_stacks(%eax), %rsp
    call ap_main
1:  cli
    hlt
    jmp 1b

    .data
    .balign 16
gdt:
    flat_descriptors
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt

    .globl ap_count, ap_cr0, ap_cr3, ap_cr4, ap_efer
    .balign 8
ap_count: .quad 0
ap_cr0: .quad 0
ap_cr3: .quad 0
ap_cr4: .quad 0
ap_efer: .quad 0

    .bss
    .globl vp_stacks
    .balign STACK_SIZE
vp_stacks:
    .skip MAX_VPS * STACK_SIZE

    .section .note.GNU-stack, "", @progbits
